// Draws a training's curves on a canvas: raw values faint, their running mean bold, single values as dots, a band.
import { css } from "./colors.js"
import { short } from "./dom.js"

const TOP = 7
const BOTTOM = 17
const LINE = 12 // CSS pixels
const FONT = "11px Inter, sans-serif"
const SHARPEST = 3 // canvas pixels a CSS pixel; two also where one would do, for the canvas may be zoomed

export function runningMean(values, window) {
  const means = []
  let [total, count] = [0, 0]
  values.forEach((value, index) => {
    if (Number.isFinite(value)) [total, count] = [total + value, count + 1]
    const old = values[index - window]
    if (index >= window && Number.isFinite(old)) [total, count] = [total - old, count - 1]
    means.push(count ? total / count : null)
  })
  return means
}

function smooth(values) {
  return runningMean(values, Math.max(1, Math.floor(values.length / 20)))
}

// The first of 1, 1.5, 2, 3, 4, 5, 6, 8 times a power of ten that is not below `value`.
function round(value) {
  const power = 10 ** Math.floor(Math.log10(value))
  return ([1, 1.5, 2, 3, 4, 5, 6, 8].find((step) => step * power >= value * 0.999) ?? 10) * power
}

// [low, high]: 0 and nearly all values lie between them.
export function range(values) {
  const ordered = values.filter(Number.isFinite).sort((a, b) => a - b)
  if (!ordered.length) return [0, 1]
  const cut = Math.floor(ordered.length / 50)
  const [low, high] = [Math.min(0, ordered[cut]), Math.max(0, ordered[ordered.length - 1 - cut])]
  if (low === high) return [0, 1]
  return [low < 0 ? -round(-low) : 0, high > 0 ? round(high) : 0]
}

// Both ranges with their zeros at the same height.
function aligned([low, high], [otherLow, otherHigh]) {
  const below = Math.min(0.8, Math.max(-low / (high - low), -otherLow / (otherHigh - otherLow)))
  if (!below) return [[low, high], [otherLow, otherHigh]]
  const stretch = (bottom, top) => {
    const from = Math.min(bottom, (-below / (1 - below)) * top)
    return [from, (-from * (1 - below)) / below]
  }
  return [stretch(low, high), stretch(otherLow, otherHigh)]
}

// Steps that point `index` of a curve covers: their middle.
function middle(index, every, last) {
  const [from, to] = [index * every + 1, Math.min((index + 1) * every, last)]
  return (from + to) / 2
}

/* Draws a plot.
 *
 * plot: {steps, every, done, cursor, lines: [{values, color, dash, right}], dots: [[step, value]], dotColor, band:
 * {values, color}, right}; `right` says whether there is an axis on the right, and of a line, whether it uses it. */
export function draw(canvas, plot, colors) {
  const [width, height] = [canvas.clientWidth, canvas.clientHeight]
  if (!width || !height) return
  const scale = Math.min(SHARPEST, Math.max(2, window.devicePixelRatio || 1))
  const [pixelsWide, pixelsHigh] = [Math.round(width * scale), Math.round(height * scale)]
  if (canvas.width !== pixelsWide) canvas.width = pixelsWide
  if (canvas.height !== pixelsHigh) canvas.height = pixelsHigh
  const ctx = canvas.getContext("2d")
  ctx.setTransform(scale, 0, 0, scale, 0, 0)
  ctx.clearRect(0, 0, width, height)
  ctx.font = FONT
  ctx.lineJoin = "round"
  const area = { ...edges(plot, width), top: TOP, bottom: height - BOTTOM }

  const lines = plot.lines.map((line) => ({ ...line, mean: smooth(line.values) }))
  const on = (right) => lines.filter((line) => Boolean(line.right) === right).flatMap((line) => line.values)
  const dots = plot.dots.map(([, value]) => value)
  const own = range([...on(false), ...dots])
  const [left, right] = plot.right ? aligned(own, range(on(true))) : [own, [0, 1]]

  const x = (step) => area.left + (step / Math.max(1, plot.steps)) * (area.right - area.left)
  const y = (value, [low, high]) => {
    const share = Math.min(1.02, Math.max(-0.02, (value - low) / (high - low)))
    return area.bottom - share * (area.bottom - area.top)
  }
  const at = (index) => x(middle(index, plot.every, plot.done))

  axes(ctx, plot, area, left, right, colors, x, y)
  if (plot.band) band(ctx, plot.band, area, colors, at)
  for (const line of lines) {
    const scaleOf = line.right ? right : left
    trace(ctx, line.values, at, (value) => y(value, scaleOf), css(colors[line.color], 0.4), 1, [])
    trace(ctx, line.mean, at, (value) => y(value, scaleOf), css(colors[line.color]), 2, line.dash ?? [])
  }
  if (plot.dots.length) {
    const color = colors[plot.dotColor]
    ctx.setLineDash([2, 3])
    ctx.lineWidth = 1
    ctx.strokeStyle = css(color)
    ctx.beginPath()
    plot.dots.forEach(([step, value]) => ctx.lineTo(x(step), y(value, left)))
    ctx.stroke()
    ctx.setLineDash([])
    for (const [step, value] of plot.dots) {
      ctx.beginPath()
      ctx.arc(x(step), y(value, left), plot.dots.length > 40 ? 2 : 3, 0, 7)
      ctx.fillStyle = css(color)
      ctx.fill()
      ctx.strokeStyle = css(colors.background)
      ctx.stroke()
    }
  }
  if (plot.cursor !== null) {
    ctx.fillStyle = css(colors.text, 0.8)
    ctx.fillRect(Math.round(x(plot.cursor)), area.top, 1, area.bottom - area.top)
  }
}

// Where the plot's area begins and ends, in CSS pixels.
export function edges(plot, width) {
  return { left: 44, right: width - (plot.right ? 44 : 10) }
}

function axes(ctx, plot, area, left, right, colors, x, y) {
  const ticks = ([low, high]) => [...new Set([low, low < 0 && high > 0 ? 0 : (low + high) / 2, high])]
  ctx.lineWidth = 1
  ctx.textBaseline = "middle"
  const write = (scale, place, align, color) => {
    ctx.textAlign = align
    ctx.fillStyle = css(colors[color])
    for (const tick of ticks(scale)) {
      const height = Math.min(area.bottom - 4, Math.max(area.top + 4, y(tick, scale)))
      if (tick < 0 && height - y(0, scale) < LINE) continue // it would touch the 0
      ctx.fillText(short(Number(tick.toPrecision(2))), place, height)
    }
  }
  for (const tick of ticks(left)) {
    ctx.fillStyle = css(colors.soft, tick === 0 ? 0.6 : 0.25)
    ctx.fillRect(area.left, Math.round(y(tick, left)), area.right - area.left, 1)
  }
  write(left, area.left - 5, "right", plot.right ? `${plot.lines[0].color}_text` : "soft")
  if (plot.right) write(right, area.right + 5, "left", `${plot.lines[1].color}_text`)
  ctx.fillStyle = css(colors.soft)
  ctx.textBaseline = "alphabetic"
  for (const [step, align] of [[0, "left"], [plot.steps / 2, "center"], [plot.steps, "right"]]) {
    if (!Number.isInteger(step)) continue
    ctx.textAlign = align
    ctx.fillText(step === plot.steps ? `${step} steps` : String(step), x(step), area.bottom + 13)
  }
}

function band(ctx, { values, color }, area, colors, at) {
  const shown = smooth(values)
  const high = (value) => area.bottom - Math.min(1, Math.max(0, value ?? 0)) * (area.bottom - area.top)
  if (!shown.length) return
  ctx.beginPath()
  ctx.moveTo(at(0), area.bottom)
  shown.forEach((value, index) => ctx.lineTo(at(index), high(value)))
  ctx.lineTo(at(shown.length - 1), area.bottom)
  ctx.fillStyle = css(colors[color], 0.22)
  ctx.fill()
  trace(ctx, shown, at, high, css(colors[color]), 1, [])
}

function trace(ctx, values, at, height, color, width, dash) {
  ctx.beginPath()
  let open = false
  values.forEach((value, index) => {
    if (!Number.isFinite(value)) {
      open = false
      return
    }
    if (open) ctx.lineTo(at(index), height(value))
    else ctx.moveTo(at(index), height(value))
    if (!open && !Number.isFinite(values[index + 1])) ctx.lineTo(at(index) + 1.5, height(value)) // a single point shows
    open = true
  })
  ctx.setLineDash(dash)
  ctx.lineWidth = width
  ctx.strokeStyle = color
  ctx.stroke()
  ctx.setLineDash([])
}
