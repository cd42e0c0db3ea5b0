// The looks of the panel and of the enlarged previews. Colors come from colors.js, as --sude-… variables.
const TEXT = `
.sude-panel, .sude-panel * { box-sizing: border-box; }
.sude-panel [hidden], .sude-view [hidden] { display: none !important; }
.sude-panel {
  position: relative; display: flex; flex-direction: column; gap: 5px; min-width: 0; width: 100%; overflow: hidden;
  contain: inline-size; padding: 6px 8px; border-radius: 6px; border: 1px solid var(--sude-border);
  background: var(--sude-background); color: var(--sude-text); font: 12px/1.35 Inter, system-ui, sans-serif;
  text-align: left; cursor: default; user-select: text;
}
.sude-panel.sude-idle { border-style: dashed; color: var(--sude-soft); padding: 3px 8px; }
.sude-panel > * { flex: none; min-width: 0; margin: 0; }
.sude-panel p { margin: 0; overflow-wrap: anywhere; }
.sude-head { display: flex; align-items: center; gap: 8px; min-height: 24px; }
.sude-panel button, .sude-view button {
  font: inherit; color: var(--sude-text); background: transparent; border: 1px solid var(--sude-control);
  border-radius: 4px; padding: 2px 8px; cursor: pointer; white-space: nowrap;
}
.sude-panel button:hover:enabled, .sude-view button:hover:enabled { background: var(--sude-border); }
.sude-panel button:disabled, .sude-view button:disabled {
  color: var(--sude-soft); border-color: var(--sude-border); cursor: default;
}
.sude-panel :focus-visible, .sude-view :focus-visible { outline: 2px solid var(--sude-l_sub); outline-offset: 1px; }
.sude-panel .sude-fold {
  flex: 1; min-width: 0; display: flex; align-items: center; gap: 6px; border-color: transparent; padding: 2px 4px;
  margin-left: -4px; font-weight: 600; text-align: left; white-space: normal;
}
.sude-fold span:last-child { overflow-wrap: anywhere; }
.sude-mark { display: inline-block; flex: none; width: 10px; line-height: 1; transition: transform 0.15s; }
[aria-expanded="true"] > .sude-mark { transform: rotate(90deg); }
.sude-bar { height: 4px; border-radius: 2px; background: var(--sude-border); overflow: hidden; }
.sude-bar > div {
  height: 100%; width: 100%; background: var(--sude-l_sub); transform-origin: left; transition: transform 0.4s linear;
}
.sude-bar.sude-finished > div { background: var(--sude-gate); }
.sude-bar.sude-failed > div, .sude-bar.sude-lost > div { background: var(--sude-error); }
.sude-facts { display: flex; flex-wrap: wrap; column-gap: 12px; font-variant-numeric: tabular-nums; }
.sude-soft { color: var(--sude-soft); }
.sude-note { color: var(--sude-note); }
.sude-error { color: var(--sude-error); white-space: pre-wrap; max-height: 8em; overflow-y: auto; }
.sude-legend { display: flex; flex-wrap: wrap; column-gap: 9px; font-size: 11px; }
.sude-legend span { display: inline-flex; align-items: center; gap: 4px; }
.sude-legend svg { flex: none; }
.sude-panel > .sude-plot { position: relative; flex: 1 1 92px; min-height: 92px; }
.sude-plot canvas { position: absolute; inset: 0; width: 100%; height: 100%; border-radius: 3px; cursor: crosshair; }
.sude-readout {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); column-gap: 8px;
  font-size: 11px; font-variant-numeric: tabular-nums; white-space: nowrap;
}
.sude-readout span { overflow: hidden; text-overflow: ellipsis; }
.sude-strip { overflow-x: auto; padding: 3px; scrollbar-width: thin; }
.sude-grid { display: grid; gap: 3px; justify-content: start; font-size: 11px; color: var(--sude-soft); }
.sude-grid > p { grid-column: 1 / -1; width: 0; min-width: 100%; }
.sude-grid > p > span {
  position: sticky; left: 0; display: inline-block; max-width: var(--sude-seen, 100%); overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; vertical-align: bottom;
}
.sude-grid > div { text-align: center; font-variant-numeric: tabular-nums; }
.sude-panel .sude-shot {
  padding: 0; border-radius: 4px; overflow: hidden; line-height: 0; background: var(--sude-border);
}
.sude-shot img {
  width: 100%; height: 100%; object-fit: cover; font-size: 9px; line-height: 1.2; color: var(--sude-text);
}
.sude-hidden {
  position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap;
}
.sude-view {
  margin: auto; padding: 14px; border: 1px solid var(--sude-control); border-radius: 8px; max-width: 94vw;
  max-height: 94vh;
  background: var(--sude-background); color: var(--sude-text); font: 14px/1.4 Inter, system-ui, sans-serif;
  overflow: auto;
}
.sude-view[open] { display: flex; flex-direction: column; gap: 10px; }
.sude-view::backdrop { background: rgba(0, 0, 0, 0.6); }
.sude-view img {
  display: block; width: min(86vw, 512px, 70vh); aspect-ratio: 1; object-fit: contain; margin: 0 auto;
}
.sude-view p { margin: 0; max-width: min(86vw, 512px, 70vh); overflow-wrap: anywhere; min-height: 2.8em; }
.sude-view div { display: flex; gap: 8px; justify-content: space-between; }
@media (prefers-reduced-motion: reduce) {
  .sude-panel *, .sude-view * { transition: none !important; animation: none !important;
  scroll-behavior: auto !important; };
}
`

// Put the style on the page, once.
export function addStyle() {
  if (document.getElementById("sude-style")) return
  document.head.append(Object.assign(document.createElement("style"), { id: "sude-style", textContent: TEXT }))
}
