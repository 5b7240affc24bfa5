// What lies over the pictures: buttons, a hint, the box's text, a scale bar. `viewer.js` follows in
// the same module and calls these functions.

const ICONS = {
  in: "M8 3v10M3 8h10",
  out: "M3 8h10",
  home: "M2.5 8 8 3l5.5 5M4.5 6.5V13h7V6.5",
  box: "M3 5V3h2M7 3h2M11 3h2v2M13 7v2M13 11v2h-2M9 13H7M5 13H3v-2M3 9V7",
  screen: "M3 6V3h3M10 3h3v3M13 10v3h-3M6 13H3v-3",
  save: "M8 2.5v7M5 7l3 3 3-3M3 13h10",
};
const HINT = "scroll to zoom · drag to move · double-click for all · shift-drag for a box";

function make(parent, kind, name, text = "") {
  const element = document.createElement(kind);
  element.className = `inkdask-${name}`;
  element.textContent = text;
  parent.append(element);
  return element;
}

// A column of buttons. actions: {icon of ICONS: [title, function]}. Returns {icon: button}.
function makeButtons(parent, actions) {
  const column = make(parent, "div", "buttons");
  const buttons = {};
  for (const [icon, [title, act]] of Object.entries(actions)) {
    const button = make(column, "button", "button");
    button.type = "button";
    button.title = title;
    button.setAttribute("aria-label", title);
    button.innerHTML = `<svg viewBox="0 0 16 16" aria-hidden="true"><path d="${ICONS[icon]}"/></svg>`;
    button.addEventListener("click", act);
    buttons[icon] = button;
  }
  return buttons;
}

// A hint that goes at the first gesture in an element.
function makeHint(parent) {
  const hint = make(parent, "div", "hint", HINT);
  const remove = () => {
    hint.remove();
    ["pointerdown", "wheel"].forEach((kind) => parent.removeEventListener(kind, remove, true));
  };
  ["pointerdown", "wheel"].forEach((kind) => parent.addEventListener(kind, remove, true));
}

// The box as an option of the command line, with buttons to copy and to remove it.
function makeBoxText(parent, onRemove) {
  const chip = make(parent, "div", "box-text");
  const words = make(chip, "code", "roi");
  const copy = make(chip, "button", "chip-button", "copy");
  const remove = make(chip, "button", "chip-button", "×");
  [copy.type, remove.type] = ["button", "button"];
  remove.title = "Remove the box";
  remove.setAttribute("aria-label", remove.title);
  remove.addEventListener("click", onRemove);
  copy.addEventListener("click", async () => {
    copy.textContent = (await copied(words)) ? "copied" : "press Ctrl-C";
    setTimeout(() => { copy.textContent = "copy"; }, 1500);
  });
  return (box, [top, left]) => {
    chip.style.display = box ? "" : "none";
    if (box) words.textContent = `--roi-xyxy ${box[2] + left},${box[0] + top},${box[3] + left},${box[1] + top}`;
  };
}

// Copy an element's text; pages that are not secure have no clipboard, so select it there.
async function copied(element) {
  try {
    await navigator.clipboard.writeText(element.textContent);
    return true;
  } catch {
    window.getSelection().selectAllChildren(element);
    return document.execCommand("copy");
  }
}

function toggleFullScreen(element) {
  if (document.fullscreenElement) document.exitFullscreen();
  else element.requestFullscreen?.();
}

// Save what the canvases show, as they lie on the screen, as one PNG.
function savePicture(root, canvases, name) {
  const frame = root.getBoundingClientRect();
  const ratio = window.devicePixelRatio || 1;
  const sheet = document.createElement("canvas");
  [sheet.width, sheet.height] = [frame.width, frame.height].map((side) => Math.round(side * ratio));
  const context = sheet.getContext("2d");
  context.fillStyle = getComputedStyle(root).backgroundColor;
  context.fillRect(0, 0, sheet.width, sheet.height);
  for (const canvas of canvases) {
    const at = canvas.getBoundingClientRect();
    context.drawImage(canvas, (at.left - frame.left) * ratio, (at.top - frame.top) * ratio);
  }
  sheet.toBlob((blob) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `${name}.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
}

// Draw a bar of a round length at the lower right; a pixel is `um` wide and `zoom` on the canvas.
function drawScaleBar(context, um, zoom, ratio) {
  const { width, height } = context.canvas;
  const most = (Math.min(160 * ratio, width / 3) / zoom) * um; // micrometers
  const power = 10 ** Math.floor(Math.log10(most));
  const length = power * [5, 2, 1].find((step) => step * power <= most);
  const [unit, name] = length >= 1e4 ? [1e4, "cm"] : length >= 1e3 ? [1e3, "mm"] : [1, "µm"];
  const across = (length / um) * zoom;
  const [x, y] = [width - 12 * ratio - across, height - 14 * ratio];
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.font = `${12 * ratio}px system-ui, sans-serif`;
  context.fillStyle = "rgba(22, 20, 18, 0.75)";
  context.fillRect(x - 8 * ratio, y - 20 * ratio, across + 16 * ratio, 28 * ratio);
  context.fillStyle = "#faf3e5";
  context.fillRect(x, y, across, 2 * ratio);
  context.textAlign = "center";
  context.fillText(`${+(length / unit).toPrecision(3)} ${name}`, x + across / 2, y - 6 * ratio);
}
