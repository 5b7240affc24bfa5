// The viewer's half in the browser. It shows pictures by tiles of scales 1, 1/2, 1/4, ...: asks the
// kernel for those in sight, keeps them, and draws a coarser one meanwhile. Panels share one view.

const PAPYRUS = 0;
const UNKNOWN = 255; // of an ink tile: not computed yet
const MOST = 254; // the value of probability 1
const KEPT_TILES = 1500; // 64 kB each
const PAGE = [22, 20, 18];
const NOT_COMPUTED = [48, 46, 52];
const LOOKS = "change:layer change:contrast change:opacity change:colour change:threshold change:pixel_um";
const LOADING = "rgb(38, 35, 32)"; // of tiles that are on their way

function render({ model, el }) {
  const root = document.createElement("div");
  root.className = "inkdask-viewer";
  const grid = make(root, "div", "grid");
  el.appendChild(root);

  const [height, width] = model.get("shape");
  const side = model.get("side");
  const coarsest = Math.max(0, Math.ceil(Math.log2(Math.max(height, width) / side)));
  const tiles = new Map(); // key -> {size, values, isStale, image, colours}
  let panels = []; // {spec, element, canvas, cursor}
  let view = { y: height / 2, x: width / 2, scale: 0 }; // the middle, and screen per pixel
  let box = null; // [y0, y1, x0, x1] while it is drawn, and after
  let isWhole = true; // whether all was in sight
  let asking = 0, drawing = 0, telling = 0;

  const buttons = makeButtons(root, {
    in: ["Zoom in", () => zoomBy(2)],
    out: ["Zoom out", () => zoomBy(0.5)],
    home: ["Show all", () => fit()],
    box: ["Draw a box", () => {
      model.set("is_drawing", !model.get("is_drawing"));
      model.save_changes();
    }],
    screen: ["Full screen", () => toggleFullScreen(root.closest(".inkdask-all") ?? root)],
    save: ["Save as PNG", () => {
      savePicture(root, panels.map(({ canvas }) => canvas), model.get("name"));
    }],
  });
  const tellBox = makeBoxText(root, () => setBox(null));
  makeHint(root);

  // --- panels

  function layOut() {
    const specs = model.get("panels");
    const columns = Math.min(model.get("columns"), specs.length);
    root.style.height = `${model.get("height")}px`;
    root.classList.toggle("titled", specs.some(({ title }) => title));
    grid.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
    grid.replaceChildren();
    panels = specs.map((spec) => {
      const element = make(grid, "div", "panel");
      const canvas = document.createElement("canvas");
      element.append(canvas);
      make(element, "div", "title", spec.title);
      const cursor = make(element, "div", "cursor");
      const loading = make(element, "div", "loading", "loading");
      const panel = { spec, element, canvas, cursor, loading };
      listen(panel);
      return panel;
    });
    sizes.disconnect();
    panels.forEach((panel) => sizes.observe(panel.element));
  }

  const sizes = new ResizeObserver(() => {
    for (const { element, canvas } of panels) {
      const ratio = window.devicePixelRatio || 1;
      canvas.width = Math.max(1, Math.round(element.clientWidth * ratio));
      canvas.height = Math.max(1, Math.round(element.clientHeight * ratio));
    }
    if (panels[0]?.element.clientWidth) {
      if (!view.scale) fit(model.get("sight"));
      else if (isWhole) fit();
      else moved();
    }
  });

  // --- the view

  const screen = () => [panels[0].element.clientHeight, panels[0].element.clientWidth];
  const whole = () => Math.min(screen()[0] / height, screen()[1] / width);

  function fit(window) {
    const [y0, y1, x0, x1] = window?.length === 4 ? window : [0, height, 0, width];
    const [h, w] = screen();
    view.scale = Math.min(h / Math.max(y1 - y0, 1), w / Math.max(x1 - x0, 1));
    [view.y, view.x] = [(y0 + y1) / 2, (x0 + x1) / 2];
    moved();
  }

  function zoomBy(factor) {
    view.scale *= factor;
    moved();
  }

  function limit() {
    view.scale = Math.min(Math.max(view.scale, 0.8 * whole()), 40);
    view.y = Math.min(Math.max(view.y, 0), height);
    view.x = Math.min(Math.max(view.x, 0), width);
  }

  function sight() {
    const [h, w] = screen();
    return [
      view.y - h / 2 / view.scale, view.y + h / 2 / view.scale,
      view.x - w / 2 / view.scale, view.x + w / 2 / view.scale,
    ];
  }

  function tell() {
    clearTimeout(telling);
    telling = setTimeout(() => {
      model.set("sight", sight());
      model.save_changes();
    }, 200);
  }

  function moved() {
    limit();
    const [y0, y1, x0, x1] = sight();
    isWhole = y0 <= 1 && x0 <= 1 && y1 >= height - 1 && x1 >= width - 1;
    redraw();
    tell();
  }

  // --- tiles

  const keyOf = (picture, level, row, column) =>
    [picture, picture === PAPYRUS ? model.get("layer") : 0, level, row, column];

  function windowOf([, , level, row, column]) {
    const step = side * 2 ** level;
    return [row * step, Math.min((row + 1) * step, height),
      column * step, Math.min((column + 1) * step, width)];
  }

  function wanted(picture) {
    const ratio = window.devicePixelRatio || 1;
    const fine = Math.floor(Math.log2(1 / (view.scale * ratio)) + 0.01);
    const level = Math.min(Math.max(fine, 0), coarsest);
    const step = side * 2 ** level;
    const [y0, y1, x0, x1] = sight();
    const keys = [];
    for (let row = Math.max(0, Math.floor(y0 / step)); row * step < Math.min(y1, height); row++) {
      for (let col = Math.max(0, Math.floor(x0 / step)); col * step < Math.min(x1, width); col++) {
        keys.push(keyOf(picture, level, row, col));
      }
    }
    const away = ([, , , row, column]) =>
      Math.hypot((row + 0.5) * step - view.y, (column + 0.5) * step - view.x);
    return keys.sort((a, b) => away(a) - away(b));
  }

  const shown = () => [...new Set(panels.flatMap(
    ({ spec }) => [...(spec.papyrus ? [PAPYRUS] : []), ...(spec.ink ? [spec.ink] : [])]))];

  function ask() {
    clearTimeout(asking);
    asking = setTimeout(() => {
      const missing = shown().flatMap(wanted).filter((key) => {
        const tile = tiles.get(key.join());
        return !tile || tile.isStale;
      });
      model.send({ kind: "tiles", wanted: missing });
    }, 60);
  }

  function keep(key, size, values) {
    const name = key.join();
    tiles.delete(name); // so that it counts as the newest
    tiles.set(name, { size, values, isStale: false, image: null, colours: "" });
    for (const old of tiles.keys()) {
      if (tiles.size <= KEPT_TILES) break;
      tiles.delete(old);
    }
  }

  // The tile, or the part of a coarser one that lies there: [tile, its key].
  function nearest(key) {
    const [picture, layer, level, row, column] = key;
    for (let up = 0; level + up <= coarsest; up++) {
      const other = [picture, layer, level + up, row >> up, column >> up];
      const tile = tiles.get(other.join());
      if (tile) return [tile, other];
    }
    return null;
  }

  // --- colours

  // over: as paint on papyrus, alone: as grey on the dark page
  function coloured(tile, picture, isOver) {
    const [low, high] = model.get("contrast");
    const isSpread = panels.some(({ spec }) => spec.ink === picture && spec.most < 1);
    const [ink, least] = [model.get("colour"), isSpread ? 0 : model.get("threshold") * MOST];
    const colours = picture === PAPYRUS ? `${low},${high}` : `${isOver} ${ink} ${least}`;
    if (tile.image && tile.colours === colours) return tile.image;
    const [h, w] = tile.size;
    const image = new ImageData(w, h);
    const pixels = new Uint32Array(image.data.buffer);
    const table = new Uint32Array(256);
    const paint = [1, 3, 5].map((at) => parseInt(ink.slice(at, at + 2), 16));
    const rgba = (r, g, b, a) => ((a << 24) | (b << 16) | (g << 8) | r) >>> 0;
    for (let v = 0; v < 256; v++) {
      const grey = Math.max(0, Math.min(255, Math.round((255 * (v - low)) / Math.max(high - low, 1))));
      const share = v < least ? 0 : v / MOST;
      table[v] = picture === PAPYRUS ? rgba(grey, grey, grey, v ? 255 : 0)
        : v === UNKNOWN ? (isOver ? 0 : rgba(...NOT_COMPUTED, 255))
        : isOver ? rgba(...paint, Math.round(255 * share))
        : rgba(...[250, 243, 229].map((c, i) => Math.round(PAGE[i] + share * (c - PAGE[i]))), 255);
    }
    for (let i = 0; i < tile.values.length; i++) pixels[i] = table[tile.values[i]];
    tile.image ??= document.createElement("canvas");
    [tile.image.width, tile.image.height] = [w, h];
    tile.image.getContext("2d").putImageData(image, 0, 0);
    tile.colours = colours;
    return tile.image;
  }

  // --- drawing

  function redraw() {
    ask();
    if (!drawing) drawing = requestAnimationFrame(() => { drawing = 0; panels.forEach(draw); });
  }

  function draw({ spec, canvas, loading }) {
    const ratio = window.devicePixelRatio || 1;
    const context = canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = `rgb(${PAGE})`;
    context.fillRect(0, 0, canvas.width, canvas.height);
    if (!view.scale) return;
    const zoom = view.scale * ratio;
    const left = canvas.width / 2 - view.x * zoom, top = canvas.height / 2 - view.y * zoom;
    context.setTransform(zoom, 0, 0, zoom, left, top);
    context.save();
    context.beginPath();
    context.rect(0, 0, width, height);
    context.clip();
    context.imageSmoothingEnabled = zoom < 1;
    let missing = spec.papyrus ? drawPicture(context, PAPYRUS, false) : 0;
    if (spec.ink) {
      context.globalAlpha = spec.papyrus ? model.get("opacity") : 1;
      missing += drawPicture(context, spec.ink, spec.papyrus);
    }
    context.restore();
    loading.classList.toggle("shown", missing > 0);
    if (box) {
      context.strokeStyle = "#ffd166";
      context.lineWidth = 1.5 * ratio / zoom;
      context.strokeRect(box[2], box[0], box[3] - box[2], box[1] - box[0]);
    }
    if (model.get("pixel_um")) drawScaleBar(context, model.get("pixel_um"), zoom, ratio);
  }

  // Returns how many tiles are on their way and have nothing coarser in their place.
  function drawPicture(context, picture, isOver) {
    let missing = 0;
    for (const key of wanted(picture)) {
      const found = nearest(key);
      const [y0, y1, x0, x1] = windowOf(key);
      if (!found) {
        missing++;
        context.fillStyle = LOADING;
        if (!isOver) context.fillRect(x0, y0, x1 - x0, y1 - y0);
        continue;
      }
      const [tile, from] = found;
      const [top, , left] = windowOf(from);
      const step = 2 ** from[2];
      const [sw, sh] = [Math.min((x1 - left) / step, tile.size[1]), Math.min((y1 - top) / step, tile.size[0])];
      const [sx, sy] = [(x0 - left) / step, (y0 - top) / step];
      const isWhole = from[2] === key[2];
      // A whole tile may reach over the edge by a part of a step: what lies there is clipped.
      const [w, h] = isWhole ? [tile.size[1], tile.size[0]] : [sw - sx, sh - sy];
      context.drawImage(coloured(tile, picture, isOver), isWhole ? 0 : sx, isWhole ? 0 : sy, w, h,
        x0, y0, w * step, h * step);
    }
    return missing;
  }

  // --- values under the cursor

  function valueAt(picture, y, x, most) {
    const found = nearest(keyOf(picture, 0, Math.floor(y / side), Math.floor(x / side)));
    if (!found) return " …";
    const [tile, [, , level]] = found;
    const [row, column] = [y, x].map((at) => (at >> level) % side);
    const value = tile.values[row * tile.size[1] + column];
    const about = level ? "≈" : " "; // a mean over 2^level pixels
    if (picture === PAPYRUS) return about + value;
    return value === UNKNOWN ? " –" : about + (most * value / MOST).toFixed(2);
  }

  function point(panel, event) {
    const frame = panel.canvas.getBoundingClientRect();
    const [dy, dx] = [event.clientY - frame.top - frame.height / 2, event.clientX - frame.left - frame.width / 2];
    return { y: view.y + dy / view.scale, x: view.x + dx / view.scale, dy, dx };
  }

  let pointer = null; // where the cursor is, in pixels of the picture

  function showCursor() {
    for (const { spec, cursor } of panels) {
      const isInside = pointer && pointer.y >= 0 && pointer.y < height && pointer.x >= 0 && pointer.x < width;
      if (!isInside) { cursor.textContent = ""; continue; }
      const [y, x] = [Math.floor(pointer.y), Math.floor(pointer.x)];
      const words = [`y ${y}  x ${x}`];
      const number = model.get("numbers")[model.get("layer")];
      if (spec.papyrus) words.push(`layer ${String(number).padStart(2, "0")}${valueAt(PAPYRUS, y, x)}`);
      const name = spec.most < 1 ? "spread" : "ink";
      if (spec.ink) words.push(`${name}${valueAt(spec.ink, y, x, spec.most)}`);
      cursor.textContent = words.join("   ");
    }
  }

  // --- hands

  function listen(panel) {
    const { canvas } = panel;
    let held = null;
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      const at = point(panel, event);
      held = { at, isBox: model.get("is_drawing") || event.shiftKey, y: view.y, x: view.x };
      event.preventDefault();
    });
    canvas.addEventListener("pointermove", (event) => {
      const at = point(panel, event);
      pointer = at;
      if (held?.isBox) {
        box = boxOf(held.at, at);
        tellBox(box, model.get("corner"));
        redraw();
      } else if (held) {
        view.y = held.y - (at.dy - held.at.dy) / view.scale;
        view.x = held.x - (at.dx - held.at.dx) / view.scale;
        moved();
      }
      showCursor();
    });
    const release = (event) => {
      if (held?.isBox) {
        box = boxOf(held.at, point(panel, event));
        const isBox = box[1] > box[0] && box[3] > box[2];
        model.set("is_drawing", false); // one box for each press of the button
        setBox(isBox ? box : null);
      }
      held = null;
    };
    canvas.addEventListener("pointerup", release);
    canvas.addEventListener("pointercancel", () => { held = null; });
    canvas.addEventListener("pointerleave", () => { pointer = null; showCursor(); });
    canvas.addEventListener("dblclick", () => fit());
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      const at = point(panel, event);
      view.scale *= Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015));
      limit();
      [view.y, view.x] = [at.y - at.dy / view.scale, at.x - at.dx / view.scale];
      moved();
    }, { passive: false });
  }

  function setBox(drawn) {
    model.set("box", drawn ?? []);
    model.save_changes();
    onBox();
  }

  function boxOf(a, b) {
    const within = (value, most) => Math.min(Math.max(value, 0), most);
    return [
      Math.floor(within(Math.min(a.y, b.y), height)), Math.ceil(within(Math.max(a.y, b.y), height)),
      Math.floor(within(Math.min(a.x, b.x), width)), Math.ceil(within(Math.max(a.x, b.x), width)),
    ];
  }

  // --- the kernel

  function receive(message, buffers) {
    if (message.kind === "tile") {
      const raw = buffers[0];
      keep(message.key, message.size,
        new Uint8Array(raw.buffer ?? raw, raw.byteOffset ?? 0, raw.byteLength));
      redraw();
      showCursor();
    } else if (message.kind === "changed") {
      const [y0, y1, x0, x1] = message.box;
      for (const [name, tile] of tiles) {
        const key = name.split(",").map(Number);
        if (key[0] !== message.picture) continue;
        const [top, bottom, left, right] = windowOf(key);
        if (top < y1 && y0 < bottom && left < x1 && x0 < right) tile.isStale = true;
      }
      redraw();
    } else if (message.kind === "look_at") {
      fit(message.box);
    }
  }

  const onDrawing = () => {
    const isDrawing = model.get("is_drawing");
    buttons.box.classList.toggle("pressed", isDrawing);
    buttons.box.setAttribute("aria-pressed", isDrawing);
    panels.forEach(({ canvas }) => canvas.classList.toggle("drawing", isDrawing));
  };
  const onPanels = () => { layOut(); onDrawing(); };
  function onBox() {
    box = model.get("box").length ? model.get("box") : null;
    tellBox(box, model.get("corner"));
    redraw();
  }
  const onLook = () => { redraw(); showCursor(); };
  const heard = {
    "msg:custom": receive, "change:panels": onPanels, "change:box": onBox,
    "change:is_drawing": onDrawing, [LOOKS]: onLook,
  };
  for (const [event, act] of Object.entries(heard)) model.on(event, act);
  layOut();
  onBox();
  onDrawing();

  // The static picture of the same output is for where this does not run.
  const frame = requestAnimationFrame(() => {
    const output = el.closest(".jp-OutputArea, .output");
    output?.querySelectorAll(".inkdask-static").forEach((still) => { still.style.display = "none"; });
  });

  return () => {
    cancelAnimationFrame(frame);
    [asking, telling].forEach(clearTimeout);
    sizes.disconnect();
    for (const [event, act] of Object.entries(heard)) model.off(event, act);
  };
}

export default { render };
