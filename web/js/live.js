// The trainings that the server tells of: the newest snapshot of each node, shown on that node's panel.
import { allNodes, api, identifier, nodeOf, openWorkflow } from "./host.js"
import { panelOf } from "./panel.js"

const EVENT = "sude.training"
const MOST = 64 // snapshots kept, over all open workflows
const LOST = "The server knows no more of this training: it was probably started anew."

const known = new Map() // the newest snapshot by page, workflow and node, the one heard of last at the end

function keyOf(snapshot) {
  return `${snapshot.client}|${identifier(snapshot.workflow) ?? ""}|${snapshot.node}`
}

// Keep a snapshot unless a newer one is there; whether it was kept.
function keep(snapshot) {
  const key = keyOf(snapshot)
  if (known.has(key) && known.get(key).number >= snapshot.number) return false
  known.delete(key)
  known.set(key, snapshot)
  if (known.size > MOST) known.delete(known.keys().next().value)
  return true
}

// Whether this page queued it, from the workflow that is open now.
function belongsHere(snapshot) {
  if (snapshot.client !== api.clientId) return false
  const [open, queued] = [openWorkflow(), identifier(snapshot.workflow)]
  return !open || !queued || queued === open
}

function show(snapshot) {
  if (belongsHere(snapshot)) panelOf(nodeOf(snapshot.node))?.show(snapshot)
}

function showAll() {
  for (const snapshot of known.values()) show(snapshot)
}

let asking = null // the request under way

// Ask the server for all trainings, and show what belongs here.
export async function catchUp() {
  asking ??= api
    .fetchApi("/sude/trainings", { cache: "no-store" })
    .then((answer) => (answer.ok ? answer.json() : null))
    .catch(() => null) // the server is away; "reconnected" will come
    .finally(() => {
      asking = null
    })
  const answer = await asking
  if (!answer) return null
  for (const snapshot of answer.trainings) keep(snapshot)
  showAll()
  return answer.trainings
}

// A server that was started anew counts from the beginning and has forgotten what ran.
async function afterReconnecting() {
  for (const [key, snapshot] of known) known.set(key, { ...snapshot, number: 0 })
  const found = await catchUp()
  if (!found) return
  const there = new Set(found.map((snapshot) => snapshot.id))
  for (const [key, snapshot] of known) {
    if (snapshot.state !== "running" || there.has(snapshot.id)) continue
    known.set(key, { ...snapshot, state: "lost", can_finish: false, left: null, error: LOST })
  }
  showAll()
}

// A workflow was opened: its panels are new.
export function afterOpening() {
  if (!allNodes().some(panelOf)) return
  showAll()
  catchUp()
}

// Before ComfyUI is ready: it complains of messages that nobody listens to.
export function listen() {
  api.addEventListener(EVENT, ({ detail }) => {
    if (keep(detail)) show(detail)
  })
  api.addEventListener("reconnected", afterReconnecting)
  let client = null // known once the websocket is there
  api.addEventListener("status", () => {
    if (api.clientId === client) return
    client = api.clientId
    showAll()
  })
}
