// Two buttons: "finish now" on SuDe Fine-Tune, "upload a subject" on SuDe Load Subject.
import { api } from "../../../scripts/api.js"
import { app } from "../../../scripts/app.js"

const UPLOADS = "sude" // folder below ComfyUI's input
const SUFFIX = ".safetensors"

function say(severity, detail) {
  app.extensionManager.toast.add({ severity, summary: "SuDe", detail, life: 6000 })
}

// A button that is part of neither the saved workflow nor the prompt.
function addButton(node, label, tooltip, action) {
  const button = node.addWidget("button", label, null, action, { serialize: false })
  button.serialize = false
  button.tooltip = tooltip
  return button
}

async function finish(node) {
  const answer = await api.fetchApi("/sude/finish", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ node: String(node.id) }),
  })
  if (answer.ok) say("info", "Finishing after this step; the workflow goes on with what was learned.")
  else say("warn", (await answer.json().catch(() => ({}))).error ?? `The server answered ${answer.status}.`)
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
  const choice = `${name} [input]`
  const widget = node.widgets.find((one) => one.name === "subject_file")
  widget.options.values = [choice, ...widget.options.values.filter((value) => value !== choice)]
  widget.value = choice
  widget.callback?.(choice)
  node.setDirtyCanvas(true, true)
}

function choose(node) {
  const picker = document.createElement("input")
  picker.type = "file"
  picker.accept = SUFFIX
  picker.onchange = () => picker.files.length && upload(node, picker.files[0])
  picker.click()
}

app.registerExtension({
  name: "SuDe",
  nodeCreated(node) {
    if (node.comfyClass === "SuDeFineTune") {
      addButton(node, "finish now", "End the training after this step and go on with what was learned.", () => finish(node))
    }
    if (node.comfyClass === "SuDeLoadSubject") {
      addButton(node, "upload a subject", "Choose a file, or drop one on the node.", () => choose(node))
      node.onDragOver = (event) => [...(event.dataTransfer?.items ?? [])].some((item) => item.kind === "file")
      node.onDragDrop = (event) => {
        const [file] = event.dataTransfer.files
        if (file) upload(node, file)
        return Boolean(file)
      }
    }
  },
})
