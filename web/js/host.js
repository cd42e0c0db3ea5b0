// ComfyUI as the pack's scripts see it: its objects, a message to the person, a button, and where a node is.
import { api } from "../../../scripts/api.js"
import { app } from "../../../scripts/app.js"

export { api, app }

export function say(severity, detail) {
  app.extensionManager.toast.add({ severity, summary: "SuDe", detail, life: 6000 })
}

// A button that is part of neither the saved workflow nor the prompt.
export function addButton(node, label, tooltip, action) {
  const button = node.addWidget("button", label, null, action, { serialize: false })
  button.serialize = false
  button.tooltip = tooltip
  return button
}

export function rootGraph() {
  return app.rootGraph ?? app.graph
}

// The node that the executor calls `id`: "3", or "12:5" for node 5 of the subgraph that node 12 stands for.
export function nodeOf(id) {
  let graph = rootGraph()
  let node = null
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part))
    graph = node?.subgraph
  }
  return node ?? null
}

// All nodes of a graph and of the subgraphs in it; one of a subgraph that is used twice comes once.
export function allNodes(graph = rootGraph(), seen = new Set()) {
  if (!graph || seen.has(graph)) return []
  seen.add(graph)
  return [...(graph.nodes ?? [])].flatMap((node) => [node, ...allNodes(node.subgraph ?? null, seen)])
}

const NO_ID = /^[0-]*$/ // of a graph that was never saved or loaded; it is given one then

// The identifier of a workflow, or null where it is none.
export function identifier(id) {
  return NO_ID.test(String(id ?? "")) ? null : String(id)
}

export function openWorkflow() {
  return identifier(rootGraph()?.id)
}
