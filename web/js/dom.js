// Small helpers for elements and for numbers shown to people; nothing is written that is there already.

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value)
    else if (value !== false) element.setAttribute(name, value === true ? "" : value)
  }
  element.append(...children)
  return element
}

export function write(element, text) {
  if (element.textContent !== text) element.textContent = text
}

export function set(element, name, value) {
  if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value)
}

export function hide(element, hidden) {
  if (element.hidden !== hidden) element.hidden = hidden
}

// 75 -> "1:15", 4000 -> "1:06:40"
export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds))
  const two = (number) => String(number).padStart(2, "0")
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60]
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`
}

// Three digits, without the zeros at the end.
export function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–"
  if (value === 0) return "0"
  const size = Math.abs(value)
  if (size >= 1e-3 && size < 1e5) return String(Number(value.toPrecision(3)))
  return value.toExponential(1).replace("e+", "e").replace(".0e", "e") // 2.5e-4, 4e-5
}

export function percent(share) {
  return `${Math.round(100 * share)}%`
}

export function pace(rate) {
  return rate >= 1 ? `${rate.toFixed(rate < 10 ? 2 : 1)} steps/s` : `${(1 / rate).toFixed(1)} s/step`
}
