// Colors that can be read on whatever background the chosen theme has.

// Of the curves, before they are made readable; the same as in the chart that the node returns, where it has them.
const CURVES = {
  l_sub: [90, 170, 255],
  validation: [255, 215, 90],
  l_sude: [255, 160, 70],
  gap: [220, 140, 255],
  gate: [120, 210, 130],
}
export const CURVE_CONTRAST = 3.2 // WCAG 1.4.11 asks for 3
export const TEXT_CONTRAST = 4.8 // WCAG 1.4.3 asks for 4.5

const THEME = ["--comfy-menu-bg", "--fg-color", "--descrip-text", "--border-color", "--error-text"]

let pixel = null // where the browser tells what a CSS color is

// [red, green, blue, alpha] of any CSS color, each 0..255.
export function rgba(css) {
  pixel ??= Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", {
    willReadFrequently: true,
  })
  pixel.clearRect(0, 0, 1, 1)
  pixel.fillStyle = "#808080" // what an unknown color leaves
  pixel.fillStyle = css
  pixel.fillRect(0, 0, 1, 1)
  return [...pixel.getImageData(0, 0, 1, 1).data]
}

export function css([red, green, blue], alpha = 1) {
  return `rgba(${Math.round(red)}, ${Math.round(green)}, ${Math.round(blue)}, ${alpha})`
}

function mix(a, b, share) {
  return [0, 1, 2].map((index) => a[index] + (b[index] - a[index]) * share)
}

// Source: WCAG 2.2, relative luminance.
function luminance(color) {
  const [red, green, blue] = color.slice(0, 3).map((value) => {
    const part = value / 255
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4
  })
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue
}

export function contrast(a, b) {
  const [dark, light] = [luminance(a), luminance(b)].sort((x, y) => x - y)
  return (light + 0.05) / (dark + 0.05)
}

// The color, as far towards white or black as it takes to stand out from the background.
export function readable(color, background, ratio) {
  const end = luminance(background) < 0.18 ? [255, 255, 255] : [0, 0, 0]
  for (let share = 0; share < 1; share += 0.05) {
    const tried = mix(color, end, share)
    if (contrast(tried, background) >= ratio) return tried
  }
  return end
}

let known = null // the colors of the theme of now
let key = ""

function themeKey() {
  const style = getComputedStyle(document.documentElement)
  return THEME.map((name) => style.getPropertyValue(name).trim()).join("|")
}

function compute() {
  const [menu, text, soft, border, error] = themeKey()
    .split("|")
    .map((value) => rgba(value || "#808080"))
  const background = mix([128, 128, 128], menu, menu[3] / 255)
  const stand = (color, ratio) => readable(color.slice(0, 3), background, ratio)
  const colors = {
    background,
    text: stand(text, 7),
    soft: stand(soft, TEXT_CONTRAST),
    error: stand(error, TEXT_CONTRAST),
    note: stand([230, 180, 60], TEXT_CONTRAST),
    border: mix(background, text, 0.22),
    control: stand(border, CURVE_CONTRAST),
  }
  for (const [name, color] of Object.entries(CURVES)) colors[name] = stand(color, CURVE_CONTRAST)
  // What stands in the color of a curve is text as well.
  for (const name of Object.keys(CURVES)) colors[`${name}_text`] = stand(CURVES[name], TEXT_CONTRAST)
  return colors
}

// {name: [red, green, blue]} for the theme of now.
export function colors() {
  if (!known) {
    key = themeKey()
    known = compute()
  }
  return known
}

// Give an element the colors as CSS variables.
export function paint(element) {
  for (const [name, color] of Object.entries(colors())) element.style.setProperty(`--sude-${name}`, css(color))
}

// Call back whenever another theme was chosen.
export function onTheme(changed) {
  new MutationObserver(() => {
    if (themeKey() === key) return
    known = null
    colors()
    changed()
  }).observe(document.documentElement, { attributes: true, attributeFilter: ["class", "style"] })
}
