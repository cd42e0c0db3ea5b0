// The pack in the page: the panel on the nodes that train, and a button on two others.
import { onTheme } from "./colors.js"
import { addButton, api, app, say } from "./host.js"
import { afterOpening, catchUp, listen } from "./live.js"
import { addPanel, drawAll } from "./panel.js"
import { addSavedButton, choose } from "./saved.js"
import { addStyle } from "./style.js"

const UPLOADS = "sude" // folder below ComfyUI's input
const SUFFIX = ".safetensors"
const TRAINERS = ["SuDeFineTune", "SuDeSweep"]

// Let the training of a node end early; whether the server takes it.
async function finish(node) {
  const answer = await api.fetchApi("/sude/finish", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ node: String(node) }),
  })
  if (answer.ok) say("info", "Finishing after this step; the workflow goes on with what was learned.")
  else say("warn", (await answer.json().catch(() => ({}))).error ?? `The server answered ${answer.status}.`)
  return answer.ok
}

async function upload(node, file) {
  if (!file.name.toLowerCase().endsWith(SUFFIX)) {
    say("warn", `${file.name} is no ${SUFFIX} file.`)
    return
  }
  const body = new FormData()
  body.append("image", file)
  body.append("subfolder", UPLOADS)
  body.append("type", "input")
  const answer = await api.fetchApi("/upload/image", { method: "POST", body })
  if (!answer.ok) {
    say("error", `The server did not take ${file.name} (${answer.status}).`)
    return
  }
  const { name } = await answer.json()
  choose(node, `${name} [input]`)
}

function pick(node) {
  const picker = document.createElement("input")
  picker.type = "file"
  picker.accept = SUFFIX
  picker.onchange = () => picker.files.length && upload(node, picker.files[0])
  picker.click()
}

listen()

app.registerExtension({
  name: "SuDe",
  setup() {
    addStyle()
    onTheme(drawAll)
    catchUp()
  },
  afterConfigureGraph: afterOpening,
  nodeCreated(node) {
    if (TRAINERS.includes(node.comfyClass)) {
      // The panel has this button where a person sees it; as a widget it is there for other scripts.
      const button = addButton(node, "finish now", "End the training after this step.", () => finish(node.id))
      button.hidden = button.options.hidden = true
      addPanel(node, finish)
    }
    if (node.comfyClass === "SuDeLoadSubject") {
      addButton(node, "upload a subject", "Choose a file, or drop one on the node.", () => pick(node))
      node.onDragOver = (event) => [...(event.dataTransfer?.items ?? [])].some((item) => item.kind === "file")
      node.onDragDrop = (event) => {
        const [file] = event.dataTransfer.files
        if (file) upload(node, file)
        return Boolean(file)
      }
    }
    if (node.comfyClass === "SuDeSaveSubject") addSavedButton(node)
  },
})
