/* Elements and drawings. Names are text of strangers: they become text nodes and nothing else. */
/** Pixels of a drawing: its greatest width and height, its least, and the least of a block as long as there is room. */
const WIDE = 190, TALL = 130, LOW = 15, NARROW = 26, THIN = 4;
/** Blocks that one path has at most. */
const BLOCKS = 6000;

// Elements

function make(tag, className, ...content) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...content.filter((one) => one !== null && one !== ""));
  return made;
}

function draw(tag, attributes, ...content) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...content);
  return made;
}

function button(className, act, ...content) {
  const made = make("button", className, ...content);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

const name = (text) => make("span", "name", text);

/** Add what `build` makes of the items, so many at a time. */
function paged(parent, items, build, size, what) {
  const rest = items.slice(size);
  parent.append(...items.slice(0, size).map(build));
  if (!rest.length) return;
  const more = button("more", () => {
    more.remove();
    paged(parent, rest, build, size, what);
  }, `${Math.min(size, rest.length)} more of ${rest.length.toLocaleString("en")} ${what}`);
  parent.append(more);
}

// Drawings

/** The outline of blocks in the pixels of a drawing, as far as the cell is shown. */
function path({ down, across }, cell, scale) {
  const d = [];
  const [rows, columns] = cell.shown;
  for (const r of down.starts) {
    if (r >= rows || d.length > BLOCKS) break;
    const y = round((r + cell.row) * scale.y), h = round(Math.min(down.run, rows - r) * scale.y);
    for (const c of across.starts) {
      if (c >= columns) break;
      const w = round(Math.min(across.run, columns - c) * scale.x);
      d.push(`M${round((c + cell.column) * scale.x)} ${y}h${w}v${h}h${-w}z`);
    }
  }
  return d.join("");
}

const round = (number) => Math.round(number * 100) / 100;
const order = new Map(); // logical tensor -> the number of its fill
D.tensors.forEach(([, , home]) => order.has(home) || order.set(home, order.size));
const fill = (home) => `url(#c${order.get(home)})`;
/** What lies over the colours, in the order in which it is needed: stripes, dots, grids. */
const LOOKS = ["", "M-2 2l4-4M0 8l8-8M6 10l4-4", "M2 2h.1M6 6h.1", "M0 4h8M4 0v8", "M0 4h8",
  "M-2 6l4 4M0 0l8 8M6-2l4 4", "M4 0v8", "M0 0l8 8M8 0l-8 8"];

/** The fills: every colour plain, then every colour with each of the looks. */
function fills() {
  const made = [...order.values()].map((number) => {
    const look = LOOKS[Math.floor(number / D.colours.length) % LOOKS.length];
    const ink = { stroke: "#000", "stroke-opacity": 0.55, fill: "none", "stroke-linecap": "round" };
    return draw("pattern", { id: `c${number}`, width: 8, height: 8, patternUnits: "userSpaceOnUse" },
      draw("rect", { width: 8, height: 8, fill: D.colours[number % D.colours.length] }),
      draw("path", { ...ink, d: look, "stroke-width": look.includes("h.1") ? 2.4 : 1 }));
  });
  return draw("svg", { width: 0, height: 0, "aria-hidden": "true", class: "fills" }, draw("defs", {}, ...made));
}

function swatch(home) {
  return draw("svg", { class: "swatch", "aria-hidden": "true" },
    draw("rect", { width: 15, height: 15, fill: fill(home), stroke: "currentColor" }));
}

/** Drawings that are on the page: {svg, cells, scale, mark}. */
let drawn = [];

/** Pixels of a column and of a row, for the largest of some pictures. */
function fitting(pictures) {
  const rows = Math.max(1, ...pictures.map((one) => one.rows));
  const columns = Math.max(1, ...pictures.map((one) => one.columns));
  const wide = Math.min(Math.max((columns / rows) * TALL, 80), WIDE);
  return { x: wide / columns, y: Math.min(Math.max((rows / columns) * wide, LOW), TALL) / rows };
}

/** A figure of cells {e, row, column, shown} in one matrix. What is too small for the scale is drawn larger. */
function figure({ cells, rows, columns, caption, cut }, fitted) {
  const found = cells.map(({ e }) => e.g.homes.map((_, p) => blocks(e, p, null)));
  const least = (way) => Math.min(...found.flat().map((one) => (one[way].starts.length > 1 ? one[way].run : Infinity)));
  const thin = { x: THIN / least("across"), y: THIN / least("down") };
  const wide = round(Math.max(columns * fitted.x, Math.min(columns * thin.x, WIDE), NARROW));
  const tall = round(Math.max(rows * fitted.y, Math.min(rows * thin.y, 2 * TALL), LOW));
  const scale = { x: wide / Math.max(columns, 1), y: tall / Math.max(rows, 1) };
  const look = scale.x < 2 * thin.x || scale.y < 2 * thin.y ? "part fine" : "part";
  const viewBox = `-1 -1 ${wide + 2} ${tall + 2}`;
  const svg = draw("svg", { width: wide + 2, height: tall + 2, viewBox, role: "img", "aria-label": caption });
  const drawing = { svg, cells, scale, mark: draw("g", {}) };
  svg.append(draw("rect", { class: "pad", width: wide, height: tall }));
  const words = [];
  cells.forEach((cell, c) => {
    cell.e.g.homes.forEach((home, p) => {
      const made = draw("path", { class: look, d: path(found[c][p], cell, scale), fill: fill(home) });
      made.target = { drawing, cell, p };
      svg.append(made);
      words.push(label(cell, p, found[c][p], scale));
    });
    if (cells.length > 1) {
      svg.append(draw("rect", { class: "frame", x: round(cell.column * scale.x), y: round(cell.row * scale.y),
        width: round(cell.shown[1] * scale.x), height: round(cell.shown[0] * scale.y) }));
    }
  });
  svg.append(draw("rect", { class: cut ? "frame cut" : "frame", width: wide, height: tall }), drawing.mark, ...words);
  drawn.push(drawing);
  return make("figure", "", svg, make("figcaption", "", caption));
}

/** The label of a part, in its first block if there is room. */
function label(cell, p, { down, across }, scale) {
  const text = D.tensors[cell.e.g.tensors[p]][1];
  const w = Math.min(across.run, cell.shown[1]) * scale.x, h = Math.min(down.run, cell.shown[0]) * scale.y;
  if (w < text.length * 6.5 + 6 || h < 13 || down.starts[0] >= cell.shown[0]) return "";
  const x = (across.starts[0] + cell.column) * scale.x + w / 2, y = (down.starts[0] + cell.row) * scale.y + h / 2;
  return draw("text", { x: round(x), y: round(y) }, text);
}

// Cards: the stored tensors of one name, drawn rank by rank or chunk by chunk

/** What a figure is made of: its cells, its extent, and what is said below it. */
function figures(entries) {
  const together = mosaic(entries);
  if (together) return [together];
  return entries.map((e) => {
    const { rows, columns, shown } = D.pictures[e.g.picture];
    const cut = shown[0] < rows || shown[1] < columns;
    return { cells: [{ e, row: 0, column: 0, shown }], rows: shown[0], columns: shown[1], caption: caption(e), cut };
  });
}

/** Whose it is, its shape, and how much of it is drawn. */
function caption(e) {
  const { shape, rows, columns, shown } = D.pictures[e.g.picture];
  const said = [rankOf(e), `[${shape.join(", ")}]`];
  if (e.g.origin) said.push(`from [${originOf(e).join(", ")}] of [${e.g.whole.join(", ")}]`);
  if (shown[0] < rows || shown[1] < columns) {
    const parts = [];
    if (shown[0] < rows) parts.push(`${shown[0]} of ${rows} rows`);
    if (shown[1] < columns) parts.push(`${shown[1]} of ${columns} columns`);
    said.push(`drawn: the first ${parts.join(" and ")}`);
  }
  return said.filter(Boolean).join(" ");
}

/** The chunks of one tensor in their places, where they lie in one plane. */
function mosaic(entries) {
  if (entries.length < 2 || entries.some((e) => !e.g.origin || e.g.rank !== undefined)) return null;
  const chunks = entries.map((e) => ({ e, origin: originOf(e), picture: D.pictures[e.g.picture] }));
  const last = chunks[0].origin.length - 1;
  const low = chunks[0].origin.map((_, d) => Math.min(...chunks.map(({ origin }) => origin[d])));
  const size = low.map((o, d) => Math.max(...chunks.map(({ origin, picture }) => origin[d] + picture.shape[d])) - o);
  const whole = ({ picture: { rows, columns, shown, shape } }) =>
    rows === shown[0] && columns === shown[1] && columns === shape[last];
  if (last < 0 || !chunks.every(whole) || size.some((n, d) => d < last - 1 && n !== 1)) return null;
  const cells = chunks.map(({ e, origin, picture: { shown } }) => ({
    e, row: last ? origin[last - 1] - low[last - 1] : 0, column: origin[last] - low[last], shown,
  }));
  const from = low.some(Boolean) ? ` from [${low.join(", ")}]` : "";
  const caption = `[${size.join(", ")}]${from} of [${entries[0].g.whole.join(", ")}], in ${entries.length} chunks`;
  return { cells, rows: last ? size[last - 1] : 1, columns: size[last], caption, cut: false };
}
