// "open saved subject" on SuDe Save Subject: goes to the SuDe Load Subject that has the saved file, or adds one.
import { addButton, app, say } from "./host.js"

const KEY = "sude_saved" // in what the node tells after it has run: [{filename, subfolder, type, choice}]
const LOADER = "SuDeLoadSubject"
const GAP = 40 // between two nodes

const told = new WeakMap() // a node -> what it saved last

// What a node has saved last, also if it did so before its workflow was opened again.
function savedBy(node) {
  const root = !node.graph || node.graph === (app.rootGraph ?? app.graph)
  const output = app.nodeOutputs?.[root ? node.id : `${node.graph.id}:${node.id}`]
  return told.get(node) ?? output?.[KEY]?.at(-1)
}

function fileWidget(loader) {
  return loader.widgets?.find((widget) => widget.name === "subject_file")
}

// Let a loader have a file that was not there when the page was loaded, as its first choice.
export function choose(loader, choice) {
  const widget = fileWidget(loader)
  const values = Array.isArray(widget.options.values) ? widget.options.values : []
  widget.options.values = [choice, ...values.filter((value) => value !== choice)]
  widget.value = choice
  widget.callback?.(choice)
  loader.setDirtyCanvas(true, true)
}

// A place right of a node where no other node is.
function placeBeside(node, size) {
  const [left, width, height] = [node.pos[0] + node.size[0] + GAP, size[0], size[1] + GAP]
  let top = node.pos[1]
  for (const other of [...node.graph.nodes].sort((a, b) => a.pos[1] - b.pos[1])) {
    const apart = other.pos[0] >= left + width || other.pos[0] + other.size[0] <= left
    const above = other.pos[1] + other.size[1] <= top - GAP || other.pos[1] - GAP >= top + height
    if (!apart && !above) top = other.pos[1] + other.size[1] + GAP + 30
  }
  return [left, top]
}

function addLoader(node, choice) {
  const loader = window.LiteGraph.createNode(LOADER)
  node.graph.beforeChange()
  loader.pos = placeBeside(node, loader.size)
  node.graph.add(loader)
  choose(loader, choice)
  node.graph.afterChange()
  return loader
}

function openSaved(node) {
  const saved = savedBy(node)
  if (!saved) {
    say("info", "Nothing was saved by this node yet: run the workflow first.")
    return
  }
  const { choice } = saved
  const there = [...node.graph.nodes].find((one) => one.type === LOADER && fileWidget(one)?.value === choice)
  const loader = there ?? addLoader(node, choice)
  if (there) choose(there, choice) // its list may not know the file yet
  app.canvas.selectNode(loader)
  app.canvas.centerOnNode(loader)
  if (!there) say("info", `A SuDe Load Subject with ${choice} was added.`)
}

export function addSavedButton(node) {
  addButton(node, "open saved subject", "Go to a SuDe Load Subject that has the saved file, or add one.", () =>
    openSaved(node),
  )
  const before = node.onExecuted
  node.onExecuted = function (output) {
    before?.call(this, output)
    const saved = output?.[KEY]?.at(-1)
    if (saved) told.set(node, saved)
  }
}
