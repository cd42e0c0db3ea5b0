// The panel's two plots with their legends, and the line that says the values at a step.
import { draw, edges } from "./chart.js"
import { colors } from "./colors.js"
import { hide, make, percent, set, short, write } from "./dom.js"

const LEAST = 92 // CSS pixels of a plot's height, as in style.js
const NAMES = { l_sub: "L_sub", l_sude: "L_sude", gap: "to inherit", gate: "gate", l_prior: "L_prior" }
const DASH = [5, 3]

// What stands for a curve in a legend.
const SIGNS = {
  line: (name) => `<path d="M0 5H14" stroke="var(--sude-${name})" stroke-width="2.5"/>`,
  dash: (name) => `<path d="M0 5H14" stroke="var(--sude-${name})" stroke-width="2.5" stroke-dasharray="5 3"/>`,
  dot: (name) => `<circle cx="7" cy="5" r="3.5" fill="var(--sude-${name})"/>`,
  band: (name) =>
    `<rect x="0.5" y="1.5" width="13" height="8" fill-opacity="0.3"` +
    ` fill="var(--sude-${name})" stroke="var(--sude-${name})"/>`,
}

function legend(...entries) {
  const items = entries.map(([sign, name, text, more]) => {
    const item = make("span", { title: more })
    item.innerHTML = `<svg width="14" height="10" aria-hidden="true">${SIGNS[sign](name)}</svg>`
    item.append(text)
    return item
  })
  return make("div", { class: "sude-legend" }, ...items)
}

export class Plots {
  // changed: called when something is to be drawn again.
  constructor(changed) {
    Object.assign(this, { changed, cursor: null, snapshot: null })
    this.subLegend = legend(
      ["line", "l_sub", "L_sub", "Denoising loss on your picture; faint: single steps, bold: their running mean."],
      ["dot", "validation", "validation", "Denoising error at fixed timesteps with fixed noise: comparable over time."],
    )
    this.dotLegend = this.subLegend.lastChild
    this.sudeLegend = legend(
      ["line", "l_sude", "L_sude", "The SuDe loss: what pulls towards the category (axis on the left)."],
      ["dash", "gap", "still to inherit", "The gap to what the category can do (axis on the right)."],
      ["band", "gate", "gate", "Share of samples with something left to inherit: 0 at the bottom, 100% at the top."],
    )
    ;[this.sub, this.sude] = [this.plot(), this.plot()]
    this.readout = make("div", { class: "sude-readout sude-soft" })
    this.parts = [this.subLegend, this.sub.box, this.sudeLegend, this.sude.box, this.readout]
  }

  plot() {
    const canvas = make("canvas", { role: "img", tabindex: "0", "aria-label": "Curves" })
    const follow = (event) => this.point(canvas, event)
    canvas.addEventListener("pointermove", follow)
    canvas.addEventListener("pointerleave", () => document.activeElement !== canvas && this.move(null))
    canvas.addEventListener("keydown", (event) => this.key(event))
    canvas.addEventListener("focus", () => set(this.readout, "aria-live", "polite"))
    canvas.addEventListener("blur", () => {
      set(this.readout, "aria-live", "off")
      this.move(null)
    })
    return { canvas, box: make("div", { class: "sude-plot" }, canvas) }
  }

  leastHeight(part) {
    return part === this.sub.box || part === this.sude.box ? LEAST : null
  }

  // Steps that have curves so far.
  get done() {
    const { curves, done, steps } = this.snapshot
    const covered = Math.min(curves.l_sub.length * curves.every, steps ?? Infinity)
    return done > covered - curves.every && done < covered ? done : covered // the last point may be begun only
  }

  get steps() {
    return Math.max(this.snapshot.steps ?? 0, this.done)
  }

  point(canvas, event) {
    const box = canvas.getBoundingClientRect()
    const { left, right } = edges(this.described(canvas), canvas.clientWidth)
    const place = ((event.clientX - box.left) / box.width) * canvas.clientWidth
    this.move(Math.round(((place - left) / (right - left)) * this.steps))
  }

  key(event) {
    const { every } = this.snapshot.curves
    const now = this.cursor ?? this.done
    const moves = { ArrowLeft: now - every, ArrowRight: now + every, Home: 1, End: this.done, Escape: null }
    if (!(event.key in moves)) return
    event.preventDefault()
    event.stopPropagation()
    this.move(moves[event.key])
  }

  move(step) {
    const cursor = step === null || !this.done ? null : Math.min(this.done, Math.max(1, step))
    if (cursor === this.cursor) return
    this.cursor = cursor
    this.changed()
  }

  show(snapshot) {
    this.snapshot = snapshot
    const there = Boolean(snapshot.curves?.l_sub?.length)
    const sude = there && Boolean(snapshot.curves.l_sude?.length)
    for (const part of [this.subLegend, this.sub.box, this.readout]) hide(part, !there)
    for (const part of [this.sudeLegend, this.sude.box]) hide(part, !sude)
    if (!there) {
      this.cursor = null
      return
    }
    if (this.cursor > this.done) this.cursor = null
    hide(this.dotLegend, !snapshot.validation?.length)
    const values = this.values()
    while (this.readout.children.length > values.length) this.readout.lastChild.remove()
    while (this.readout.children.length < values.length) this.readout.append(make("span"), " ")
    values.forEach((value, index) => write(this.readout.children[index], value))
    set(this.sub.canvas, "aria-label", this.summary(["l_sub"], snapshot.validation))
    if (sude) set(this.sude.canvas, "aria-label", this.summary(["l_sude", "gap", "gate"]))
  }

  described(canvas) {
    const { curves, validation } = this.snapshot
    const common = { steps: this.steps, done: this.done, every: curves.every, cursor: this.cursor }
    const right = Boolean(curves.l_sude?.length)
    if (canvas === this.sub.canvas) {
      const lines = [{ values: curves.l_sub, color: "l_sub" }]
      return { ...common, lines, dots: validation ?? [], dotColor: "validation" }
    }
    const lines = [
      { values: curves.l_sude, color: "l_sude" },
      { values: curves.gap ?? [], color: "gap", dash: DASH, right: true },
    ]
    return { ...common, lines, dots: [], band: { values: curves.gate ?? [], color: "gate" }, right }
  }

  draw() {
    for (const { canvas, box } of [this.sub, this.sude]) {
      if (!box.hidden) draw(canvas, this.described(canvas), colors())
    }
  }

  // The values at the cursor, or the newest.
  values() {
    const { curves, validation } = this.snapshot
    const step = this.cursor ?? this.done
    const index = Math.min(curves.l_sub.length - 1, Math.max(0, Math.ceil(step / curves.every) - 1))
    const [from, to] = [index * curves.every + 1, Math.min((index + 1) * curves.every, this.done)]
    const parts = [to > from ? `steps ${from}–${to}` : `step ${to}`]
    for (const [term, name] of Object.entries(NAMES)) {
      const value = curves[term]?.[index]
      if (value === undefined) continue
      parts.push(`${name} ${term === "gate" && value !== null ? percent(value) : short(value)}`)
    }
    const near = (validation ?? []).filter(([at]) => at <= to).at(-1)
    if (near) parts.push(`validation ${short(near[1])}`)
    return parts
  }

  // What a curve shows, for those who do not see it.
  summary(terms, validation = []) {
    const { curves } = this.snapshot
    const parts = terms.map((term) => {
      const values = (curves[term] ?? []).filter(Number.isFinite)
      if (!values.length) return `${NAMES[term]}: no values`
      return `${NAMES[term]} from ${short(values[0])} to ${short(values.at(-1))}, lowest ${short(Math.min(...values))}`
    })
    const last = validation?.at(-1)
    if (last) parts.push(`validation ${short(last[1])} at step ${last[0]}`)
    return `Curves over ${this.done} of ${this.steps} steps. ${parts.join("; ")}. Arrow keys show single steps.`
  }
}
