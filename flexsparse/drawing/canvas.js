// Brings .flexsparse elements to life: the wheel zooms, dragging moves, hovering names a cell.
(() => {
  // what a cell is worth: the percent kept in a PARTIAL one, or one of these
  const UNDER_1 = 101, OVER_99 = 102, FULL = 254, UNKNOWN = 255;
  const numbers = new Intl.NumberFormat("en-US");

  // The runs of a grid: of row r those from first[r] to first[r + 1]; what is in none is EMPTY.
  async function decode(text, rows) {
    const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const buffer = await new Response(stream).arrayBuffer();
    const counts = new Uint16Array(buffer, 0, rows);
    const first = new Uint32Array(rows + 1);
    for (let r = 0; r < rows; r++) {
      if (r) counts[r] += counts[r - 1];
      first[r + 1] = first[r] + counts[r];
    }
    const n = first[rows];
    const gaps = new Uint16Array(buffer, 2 * rows, n);
    const lengths = new Uint16Array(buffer, 2 * (rows + n), n);
    const value = new Uint8Array(buffer, 2 * rows + 4 * n, n);
    const start = new Uint32Array(n), end = new Uint32Array(n);
    for (let r = 0; r < rows; r++) {
      for (let i = first[r], column = 0; i < first[r + 1]; i++) {
        // numbers are differences to the same run of the row above, where it has as many
        const above = r ? first[r - 1] + i - first[r] : n;
        if (above < first[r]) {
          gaps[i] += gaps[above];
          lengths[i] += lengths[above];
          value[i] += value[above];
        }
        start[i] = column + gaps[i];
        column = end[i] = start[i] + lengths[i];
      }
    }
    return { first, start, end, value };
  }

  function valueAt(grid, row, column) {
    for (let i = grid.first[row]; i < grid.first[row + 1]; i++) {
      if (column < grid.end[i]) return column < grid.start[i] ? -1 : grid.value[i];
    }
    return -1;
  }

  const partOf = (value) => (value <= 100 ? value / 100
    : { [UNDER_1]: 0.0025, [OVER_99]: 0.9975, [FULL]: 1, [UNKNOWN]: 0.25 }[value]);

  // Colours as 0xAABBGGRR: EMPTY, FULL, and 201 shades of PARTIAL.
  function palette(colours) {
    const packed = ([r, g, b]) => (255 << 24) | (b << 16) | (g << 8) | r;
    const [empty, sparse, dense, full] = colours;
    const shades = Array.from({ length: 201 }, (_, i) =>
      packed(sparse.map((x, k) => Math.round(x + (dense[k] - x) * Math.sqrt(i / 200)))));
    return { empty: packed(empty), full: packed(full), shades };
  }

  // Sums over the cells of a pixel: runs add to its two ends, and a step to what lies between.
  class Sums {
    constructor(width) {
      this.own = new Float64Array(width + 2);
      this.steps = new Float64Array(width + 2);
    }
    clear() {
      this.own.fill(0);
      this.steps.fill(0);
    }
    add(x0, x1, weight) {
      const a = Math.floor(x0), b = Math.floor(x1);
      this.own[a] += weight * ((a === b ? x1 : a + 1) - x0);
      if (a === b) return;
      this.own[b] += weight * (x1 - b);
      this.steps[a + 1] += weight;
      this.steps[b] -= weight;
    }
  }

  // A pixel is coloured if any of its cells is computed, and FULL if all of them are.
  function paint(canvas, grid, view, rows, colours) {
    const { width, height } = canvas, context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    const across = width / view.width, down = height / view.height;
    const live = new Sums(width), kept = new Sums(width), full = new Sums(width);
    for (let y = 0; y < height; y++) {
      let top = Math.floor(view.y + (y + 0.5) / down), bottom = top + 1;
      if (down < 1) {
        top = Math.floor(view.y + y / down);
        bottom = Math.ceil(view.y + (y + 1) / down);
      }
      top = Math.min(Math.max(0, top), rows - 1);
      bottom = Math.min(rows, bottom);
      for (const sums of [live, kept, full]) sums.clear();
      for (let i = grid.first[top]; i < grid.first[bottom]; i++) {
        let x0 = (grid.start[i] - view.x) * across, x1 = (grid.end[i] - view.x) * across;
        if (across >= 1) {
          x0 = Math.round(x0);
          x1 = Math.round(x1);
        }
        x0 = Math.max(0, x0);
        x1 = Math.min(width, x1);
        if (x0 >= x1) continue;
        live.add(x0, x1, 1);
        kept.add(x0, x1, partOf(grid.value[i]));
        if (grid.value[i] === FULL) full.add(x0, x1, 1);
      }
      let isLive = 0, isKept = 0, isFull = 0;
      for (let x = 0; x < width; x++) {
        isLive += live.steps[x];
        isKept += kept.steps[x];
        isFull += full.steps[x];
        const shade = Math.round((200 * (isKept + kept.own[x])) / (bottom - top));
        pixels[y * width + x] = isLive + live.own[x] < 1e-7 ? colours.empty
          : isFull + full.own[x] > bottom - top - 1e-6 ? colours.full
          : colours.shades[Math.max(0, Math.min(200, shade))];
      }
    }
    context.putImageData(image, 0, 0);
  }

  async function start(root) {
    const spec = JSON.parse(root.dataset.grid);
    const [rows, columns] = spec.cells;
    const grids = await Promise.all(spec.panels.map((panel) => decode(panel.runs, rows)));
    const part = (name) => root.querySelector(".flexsparse-" + name);
    const view = { x: 0, y: 0, width: columns, height: rows }; // of all panels, in cells
    const canvases = [...root.querySelectorAll("canvas")];
    const still = root.querySelector("img");
    if (still) still.style.display = "none";
    part("live").style.display = "";

    const range = ([one, more], [from, to]) => (to - from > 1
      ? `${more} ${numbers.format(from)}-${numbers.format(to - 1)}` : `${one} ${numbers.format(from)}`);
    const tokensOf = [["query", "queries"], ["key", "keys"]];
    const blocksOf = [["q block", "q blocks"], ["kv block", "kv blocks"]];
    const cells = (place, axis) => {
      const from = place * spec.side[axis], all = Math.ceil(spec.lengths[axis] / spec.block[axis]);
      return [from, Math.min(from + spec.side[axis], all)];
    };
    const tokens = ([from, to], axis) => {
      const offset = axis ? 0 : spec.q_offset;
      return [from * spec.block[axis] + offset, Math.min(to * spec.block[axis], spec.lengths[axis]) + offset];
    };
    const named = (place, axis) => range(tokensOf[axis], tokens(cells(place, axis), axis));
    function describe(panel, row, column) {
      const value = valueAt(grids[panel], row, column), who = spec.panels[panel].who;
      if (spec.elements) return `${who}, ${named(row, 0)}, ${named(column, 1)}: ${value < 0 ? "masked" : "kept"}`;
      const state = value < 0 ? "empty" : value === FULL ? "full"
        : value === UNKNOWN ? "partial, not counted"
        : `partial, ${value === UNDER_1 ? "under 1" : value === OVER_99 ? "over 99" : value} %`;
      const place = [row, column].map((cell, axis) => range(blocksOf[axis], cells(cell, axis))).join(", ");
      return `${who}, ${place}: ${state}\n${named(row, 0)}, ${named(column, 1)}`;
    }
    function shown() {
      const [top, left] = [view.y, view.x].map(Math.floor);
      const bottom = Math.ceil(view.y + view.height) - 1, right = Math.ceil(view.x + view.width) - 1;
      const span = (a, b, axis) => [tokens(cells(a, axis), axis)[0], tokens(cells(b, axis), axis)[1]];
      return `Shown: ${range(tokensOf[0], span(top, bottom, 0))}, ${range(tokensOf[1], span(left, right, 1))}`;
    }

    let queued = false;
    function draw() {
      queued = false;
      // the text colour tells whether the page is dark, whatever made it so
      const [r, g, b] = getComputedStyle(root).color.match(/[\d.]+/g).map(Number);
      const dark = 0.3 * r + 0.6 * g + 0.1 * b > 128;
      root.dataset.dark = dark;
      const colours = palette(dark ? spec.dark : spec.light);
      const dots = window.devicePixelRatio || 1;
      canvases.forEach((canvas, i) => {
        canvas.width = Math.round(canvas.clientWidth * dots);
        canvas.height = Math.round(canvas.clientHeight * dots);
        if (canvas.width && canvas.height) paint(canvas, grids[i], view, rows, colours);
      });
      part("shown").textContent = shown();
    }
    function redraw() {
      if (!queued) requestAnimationFrame(draw);
      queued = true;
    }
    function keepInside() {
      view.x = Math.min(Math.max(0, view.x), columns - view.width);
      view.y = Math.min(Math.max(0, view.y), rows - view.height);
      redraw();
    }

    const tip = part("hover");
    function point(text, event) {
      tip.textContent = text;
      tip.style.display = "block";
      const box = root.getBoundingClientRect();
      const most = box.width - tip.offsetWidth;
      tip.style.left = Math.max(0, Math.min(event.clientX - box.left + 14, most)) + "px";
      tip.style.top = event.clientY - box.top + 18 + "px";
    }

    canvases.forEach((canvas, i) => {
      const at = (event) => {
        const box = canvas.getBoundingClientRect();
        return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
      };
      canvas.addEventListener("wheel", (event) => {
        const [x, y] = at(event);
        const wanted = Math.exp(Math.max(-1, Math.min(1, event.deltaY / 300)));
        const least = Math.min(1, 4 / Math.max(view.width, view.height));
        const factor = Math.min(Math.max(wanted, least), columns / view.width);
        if (factor === 1 && wanted > 1) return; // all is shown: the page may scroll
        event.preventDefault();
        view.x += x * view.width * (1 - factor);
        view.y += y * view.height * (1 - factor);
        view.width *= factor;
        view.height *= factor;
        keepInside();
      }, { passive: false });
      let held = null;
      canvas.addEventListener("pointerdown", (event) => {
        held = at(event);
        canvas.setPointerCapture(event.pointerId);
      });
      canvas.addEventListener("pointerup", () => { held = null; });
      canvas.addEventListener("pointermove", (event) => {
        const [x, y] = at(event);
        if (held) {
          view.x -= (x - held[0]) * view.width;
          view.y -= (y - held[1]) * view.height;
          held = [x, y];
          keepInside();
        }
        const row = Math.floor(view.y + y * view.height), column = Math.floor(view.x + x * view.width);
        if (row >= 0 && row < rows && column >= 0 && column < columns) point(describe(i, row, column), event);
      });
      canvas.addEventListener("pointerleave", () => { tip.style.display = "none"; });
      canvas.addEventListener("dblclick", () => {
        Object.assign(view, { x: 0, y: 0, width: columns, height: rows });
        redraw();
      });
    });
    new ResizeObserver(redraw).observe(part("live"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
    root.addEventListener("pointerenter", redraw);
    draw();
    root.dataset.ready = "";
  }

  for (const root of document.querySelectorAll(".flexsparse:not([data-live])")) {
    root.dataset.live = "";
    start(root).catch((error) => console.warn("flexsparse: the picture stays still.", error));
  }
})();
