// The filmstrip of previews on a panel, and the larger view of one of them.
import { paint } from "./colors.js"
import { hide, make, percent, write } from "./dom.js"
import { api } from "./host.js"

const SIZES = [56, 56, 48, 40] // CSS pixels of a picture, by the number of prompts

function address({ filename, subfolder, type }) {
  return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`)
}

export class Film {
  constructor() {
    this.about = make("p", { class: "sude-soft" })
    this.grid = make("div", { class: "sude-grid" })
    this.strip = make("div", { class: "sude-strip", role: "group", "aria-label": "Previews" }, this.grid)
    this.buttons = new Map() // by file
    this.shots = []
    this.prompts = []
    this.drawn = ""
  }

  show(previews) {
    const shots = previews?.shots ?? []
    hide(this.about, !previews)
    hide(this.strip, !shots.length)
    if (previews) write(this.about, cost(previews))
    ;[this.shots, this.prompts] = [shots, previews?.prompts ?? []]
    const drawn = JSON.stringify([this.prompts, shots])
    if (drawn === this.drawn) return
    this.drawn = drawn
    this.arrange()
    if (viewer?.film === this) viewer.refresh()
  }

  // Columns are steps, rows are prompts. Buttons that stay are kept, so that nothing is loaded twice.
  arrange() {
    const focused = document.activeElement
    const atEnd = this.strip.scrollLeft + this.strip.clientWidth >= this.strip.scrollWidth - 8
    const size = SIZES[Math.min(this.prompts.length, SIZES.length) - 1] ?? SIZES[0]
    const old = this.buttons
    this.buttons = new Map()
    const cells = this.prompts.flatMap((prompt, row) => [
      make("p", { title: prompt }, make("span", {}, prompt)),
      ...this.shots.map((shot) => this.button(old, shot, row, size)),
    ])
    this.grid.style.gridTemplateColumns = `repeat(${this.shots.length}, ${size}px)`
    this.grid.replaceChildren(...cells, ...this.shots.map((shot) => make("div", {}, String(shot.step))))
    if (this.grid.contains(focused)) focused.focus({ preventScroll: true })
    if (atEnd) this.toEnd()
  }

  button(old, shot, row, size) {
    const picture = shot.pictures[row]
    if (!picture) return make("span")
    const name = `${picture.subfolder}/${picture.filename}`
    const button =
      old.get(name) ??
      make(
        "button",
        { type: "button", class: "sude-shot", onclick: () => open(this, shot.step, row) },
        make("img", { alt: label(this.prompts[row], shot.step), src: address(picture), draggable: "false" }),
      )
    button.style.height = `${size}px`
    this.buttons.set(name, button)
    return button
  }

  // Called when the strip has its width: captions stay in what is seen of it, and the newest pictures show.
  measure() {
    const seen = `${this.strip.clientWidth - 8}px`
    if (this.grid.style.getPropertyValue("--sude-seen") === seen) return
    this.grid.style.setProperty("--sude-seen", seen)
    this.toEnd()
  }

  toEnd() {
    this.strip.scrollLeft = this.strip.scrollWidth
  }
}

function label(prompt, step) {
  return `${prompt}, step ${step}`
}

function cost({ every, share, limit, note, shots }) {
  const text = shots.length ? `${percent(share)} of the time (limit ${percent(limit)})` : `every ${every} steps`
  return ["previews: " + text, ...(note ? [note] : [])].join(" · ")
}

let viewer = null // the one open view

function open(film, step, row) {
  viewer?.dialog.close()
  viewer = new Viewer(film, step, row)
}

class Viewer {
  constructor(film, step, row) {
    Object.assign(this, { film, step, row })
    this.image = make("img")
    this.text = make("p", { "aria-live": "polite" })
    const button = (text, act) => make("button", { type: "button", onclick: act }, text)
    this.back = button("‹ earlier", () => this.move(-1, 0))
    this.on = button("later ›", () => this.move(1, 0))
    this.other = button("other prompt", () => this.move(0, 1))
    const close = button("close", () => this.dialog.close())
    const keys = make("div", {}, this.back, this.on, this.other, close)
    this.dialog = make("dialog", { class: "sude-view", "aria-label": "Preview" }, this.image, this.text, keys)
    paint(this.dialog)
    this.dialog.addEventListener("keydown", (event) => this.key(event))
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.dialog.close())
    this.dialog.addEventListener("close", () => {
      this.dialog.remove()
      if (viewer === this) viewer = null
    })
    document.body.append(this.dialog)
    this.refresh()
    this.dialog.showModal()
  }

  // Keys that are used here are not ComfyUI's meanwhile; Escape closes a dialog by itself.
  key(event) {
    event.stopPropagation()
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }
    if (!moves[event.key]) return
    event.preventDefault()
    this.move(...moves[event.key])
  }

  get column() {
    const found = this.film.shots.findIndex((shot) => shot.step >= this.step)
    return found < 0 ? this.film.shots.length - 1 : found
  }

  move(columns, rows) {
    const { shots, prompts } = this.film
    const column = Math.min(shots.length - 1, Math.max(0, this.column + columns))
    this.step = shots[column]?.step ?? this.step
    this.row = (this.row + rows + prompts.length) % prompts.length
    this.refresh()
  }

  refresh() {
    const { shots, prompts } = this.film
    const shot = shots[this.column]
    const picture = shot?.pictures[this.row]
    if (!picture) return
    this.step = shot.step
    const text = label(prompts[this.row], shot.step)
    this.image.src = address(picture)
    this.image.alt = text
    write(this.text, text)
    this.back.disabled = this.column === 0
    this.on.disabled = this.column === shots.length - 1
    hide(this.other, prompts.length < 2)
  }
}
