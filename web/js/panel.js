// The panel on a training node: what is going on, how far it is, the curves and the previews.
import { paint } from "./colors.js"
import { clock, hide, make, pace, set, write } from "./dom.js"
import { Film } from "./film.js"
import { Plots } from "./plots.js"

export const NAME = "sude_live" // of the widget
const MARGIN = 6 // CSS pixels that the classic canvas leaves around the panel
const GAP = 5 // between its parts
const MOST = 1.6 // how many times its least height it may take on a node that is larger
const IDLE = "Curves appear here during training."
const STATES = { finished: "finished", stopped: "stopped", failed: "failed", lost: "lost" }

const panels = new WeakMap() // the element of a widget -> its panel
const folded = new Set() // what the person folded, by workflow and node, until the page is left

// The panel of a node, if it has one.
export function panelOf(node) {
  const widget = node?.widgets?.find((one) => one.name === NAME)
  return widget ? panels.get(widget.element) : undefined
}

// The names in `alive` are drawn again when the theme changes or the page is looked at again.
const alive = new Set()

export function drawAll() {
  for (const panel of alive) panel.repaint()
}

// Give a node its panel: the last widget, in neither the saved workflow nor the prompt.
export function addPanel(node, finish) {
  const panel = new Panel(node, finish)
  const widget = node.addDOMWidget(NAME, "sude_live", panel.element, {
    serialize: false,
    hideInPanel: true, // there is one element, and it belongs on the node
    margin: MARGIN,
    getMinHeight: () => panel.height + 2 * MARGIN,
    getMaxHeight: () => panel.height * (panel.open ? MOST : 1) + 2 * MARGIN,
  })
  widget.serialize = false
  const removed = node.onRemoved
  node.onRemoved = function (...given) {
    panel.rest()
    return removed?.apply(this, given)
  }
  const added = node.onAdded
  node.onAdded = function (...given) {
    panel.wake()
    return added?.apply(this, given)
  }
  if (node.graph) panel.wake() // else it is not in a graph yet, and may never be
  return panel
}

export class Panel {
  constructor(node, finish) {
    Object.assign(this, { node, snapshot: null, seen: false, frame: 0, height: 26, finishing: null })
    this.idle = make("p", {}, IDLE)
    this.title = make("span")
    this.fold = make(
      "button",
      { type: "button", class: "sude-fold", "aria-expanded": "true", onclick: () => this.toggle() },
      make("span", { class: "sude-mark", "aria-hidden": "true" }, "▸"),
      this.title,
    )
    this.finish = make("button", { type: "button", onclick: () => this.askToFinish(finish) }, "finish now")
    this.finish.title = "End the training after this step and go on with what was learned."
    this.head = make("div", { class: "sude-head" }, this.fold, this.finish)
    this.fill = make("div")
    const bar = { class: "sude-bar", role: "progressbar", "aria-valuemin": "0", "aria-label": "Progress" }
    this.bar = make("div", bar, this.fill)
    this.facts = make("div", { class: "sude-facts" })
    this.about = make("p", { class: "sude-soft" })
    this.line = make("p")
    this.notice = make("p", { class: "sude-note" })
    this.error = make("p", { class: "sude-error" })
    this.plots = new Plots(() => this.later())
    this.film = new Film()
    this.spoken = make("div", { class: "sude-hidden", "aria-live": "polite" })
    this.body = [
      ...[this.facts, this.about, this.line, this.notice, this.error],
      ...[...this.plots.parts, this.film.about, this.film.strip],
    ]
    this.element = make(
      "section",
      { class: "sude-panel sude-idle", "aria-label": "Training" },
      ...[this.idle, this.head, this.bar, ...this.body, this.spoken],
    )
    for (const part of [this.head, this.bar, ...this.body]) part.hidden = true
    for (const kind of ["wheel", "pointerdown", "pointermove", "pointerup"]) {
      this.element.addEventListener(kind, (event) => forward(event, this.film.strip), { passive: false })
    }
    panels.set(this.element, this)
    paint(this.element)
  }

  get open() {
    return this.snapshot !== null && !folded.has(this.key)
  }

  get key() {
    return `${this.snapshot?.workflow ?? ""}|${this.snapshot?.node}`
  }

  // Begin to watch whether and how large the panel is shown.
  wake() {
    if (this.sight) return
    alive.add(this)
    this.sight = new IntersectionObserver((entries) => {
      this.seen = entries.at(-1).isIntersecting
      if (this.seen) this.later()
    })
    this.sight.observe(this.element)
    this.sizes = new ResizeObserver(() => this.later())
    for (const part of this.element.children) this.sizes.observe(part)
    setTimeout(() => this.settle(), 100)
  }

  // Nodes 2.0 keeps what it shows for a node when another of the same id takes its place in the same moment: that is
  // the panel of the node that went.
  settle() {
    const { element, node } = this
    if (!this.sight || element.isConnected || !node.graph || !window.LiteGraph.vueNodesMode) return
    const shown = document.querySelector(`[data-node-id="${CSS.escape(node.id)}"] .sude-panel`)
    if (shown && !panels.get(shown)?.sight) shown.replaceWith(element)
  }

  // The node was removed.
  rest() {
    this.sight?.disconnect()
    this.sizes?.disconnect()
    this.sight = this.sizes = null
    cancelAnimationFrame(this.frame)
    this.frame = 0
    this.seen = false
    alive.delete(this)
  }

  // Take the newest snapshot; it is drawn with the next frame in which the panel can be seen.
  show(snapshot) {
    const before = this.snapshot
    this.snapshot = snapshot
    const part = String(snapshot.part) !== String(before?.part)
    if (part || snapshot.state !== before?.state || snapshot.phase !== before?.phase || snapshot.id !== before?.id) {
      write(this.spoken, `${this.subject()}: ${this.state()}`)
    }
    this.later()
  }

  later() {
    if (this.frame || !this.seen) return
    this.frame = requestAnimationFrame(() => {
      this.frame = 0
      if (this.seen) this.render()
    })
  }

  repaint() {
    paint(this.element)
    this.later()
  }

  toggle() {
    if (this.open) folded.add(this.key)
    else folded.delete(this.key)
    this.later()
  }

  async askToFinish(finish) {
    const id = this.snapshot.id
    this.finishing = id
    this.later()
    if (!(await finish(this.snapshot.node))) this.finishing = null
    this.later()
  }

  state() {
    return STATES[this.snapshot.state] ?? this.snapshot.phase
  }

  // What is trained, and which of how many of a sweep it is.
  subject() {
    const { title, part } = this.snapshot
    return part ? `${part[0]} of ${part[1]}: ${title}` : title
  }

  render() {
    const { snapshot, open } = this
    if (!snapshot) {
      this.measure()
      return
    }
    this.element.classList.remove("sude-idle")
    hide(this.idle, true)
    hide(this.head, false)
    hide(this.bar, false)
    this.renderHead(snapshot, open)
    if (open) {
      this.renderFacts(snapshot)
      this.plots.show(snapshot)
      this.film.show(snapshot.previews)
    } else {
      for (const part of this.body) hide(part, true)
    }
    this.measure()
    if (open) {
      this.plots.draw()
      if (!this.film.strip.hidden) this.film.measure()
    }
  }

  renderHead(snapshot, open) {
    const { state, done, total, can_finish: can } = snapshot
    const running = state === "running"
    const counted = running && total > 1 ? ` ${done}/${total}` : ""
    write(this.title, this.state() + counted)
    set(this.fold, "aria-expanded", open)
    set(this.fold, "title", open ? "Fold this panel" : "Unfold this panel")
    const asked = this.finishing === snapshot.id
    hide(this.finish, !running)
    this.finish.disabled = !can || asked
    write(this.finish, asked ? "finishing …" : "finish now")
    const share = state === "finished" ? 1 : Math.min(1, total ? done / total : 0)
    this.fill.style.transform = `scaleX(${share})`
    set(this.bar, "class", `sude-bar sude-${state}`)
    set(this.bar, "aria-valuemax", Math.max(1, total))
    set(this.bar, "aria-valuenow", state === "finished" ? Math.max(1, total) : done)
    set(this.bar, "aria-valuetext", this.title.textContent)
  }

  renderFacts(snapshot) {
    const { state, rate, left, elapsed, memory, line, notice, error, curves } = snapshot
    const running = state === "running"
    const facts = []
    if (running && rate) facts.push(pace(rate))
    if (running && left !== null && left !== undefined) facts.push(`${clock(left)} left`)
    if (elapsed !== null && elapsed !== undefined) facts.push(`${clock(elapsed)} elapsed`)
    if (memory) facts.push(`${gigabytes(memory[0])} of ${gigabytes(memory[1])} GB`)
    while (this.facts.children.length > facts.length) this.facts.lastChild.remove()
    facts.forEach((fact, index) => {
      if (!this.facts.children[index]) this.facts.append(make("span"))
      write(this.facts.children[index], fact)
    })
    hide(this.facts, !facts.length)
    fill(this.about, this.subject())
    fill(this.line, running && curves?.l_sub?.length ? "" : line) // the curves say more
    fill(this.notice, notice && `note: ${notice}`)
    fill(this.error, error)
  }

  // Make a node of the classic canvas as large as it has to be now, never smaller. Nodes 2.0 grows by itself.
  grow() {
    const { node } = this
    if (!window.LiteGraph.vueNodesMode && !node.flags?.collapsed) {
      const [width, height] = node.computeSize()
      if (width > node.size[0] || height > node.size[1]) {
        node.setSize([Math.max(width, node.size[0]), Math.max(height, node.size[1])])
      }
    }
    node.setDirtyCanvas?.(true, true)
  }

  // The least height at which nothing is cut off. The classic canvas asks for it, Nodes 2.0 sees it by itself.
  measure() {
    const style = getComputedStyle(this.element)
    let height = ["paddingTop", "paddingBottom", "borderTopWidth", "borderBottomWidth"]
      .map((name) => parseFloat(style[name]))
      .reduce((a, b) => a + b)
    let parts = 0
    for (const part of this.element.children) {
      if (part.hidden || part === this.spoken) continue
      height += this.plots.leastHeight(part) ?? part.offsetHeight
      parts += 1
    }
    height = Math.ceil(height + GAP * Math.max(0, parts - 1))
    if (height === this.height) return
    this.height = height
    this.grow()
  }
}

function fill(element, text) {
  hide(element, !text)
  write(element, text || "")
}

function gigabytes(bytes) {
  return (bytes / 1e9).toFixed(1)
}

// The wheel zooms and the middle button moves the canvas also over the panel, as over any other part of a node. Where
// the strip can be scrolled sideways, it is.
function forward(event, strip) {
  if (event.type === "wheel") {
    const sideways = Math.abs(event.deltaX) > Math.abs(event.deltaY) || event.shiftKey
    if (sideways && !event.ctrlKey && strip.contains(event.target) && strip.scrollWidth > strip.clientWidth) {
      event.stopPropagation()
      return
    }
  } else if (event.button !== 1 && !(event.buttons & 4)) return
  const canvas = document.getElementById("graph-canvas")
  if (!canvas) return
  event.preventDefault()
  event.stopPropagation()
  canvas.dispatchEvent(new event.constructor(event.type, event))
}
