"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const make = (tag, attributes = {}, ...children) => {
  const svg = ["svg", "rect", "text", "line", "path", "circle", "title", "g"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") node.textContent = value; else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
};

/* ---- theme ---- */
$("theme").addEventListener("click", () => {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  try { localStorage.setItem("theme", next); } catch (error) { /* a page from disk may have no storage */ }
  if (data.layers) drawHeat();
  drawCurve();
});
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/* ---- prompts: sortable, worst first ---- */
const state = { sort: { key: data.prompts_sort.key, up: data.prompts_sort.up }, figure: data.prompts_sort.figure, open: -1 };
const number = (value, figure) => {
  if (value === undefined || value === null) return "–";
  const digits = (data.figures[figure] || {}).digits ?? 3;
  return value.toFixed(digits);
};
function valueOf(item, key) {
  if (key === "text") return item.text;
  const value = (item.runs[key] || {}).figures?.[state.figure];
  return value === undefined ? null : value;
}
function compareItems(a, b) {
  const x = valueOf(a, state.sort.key), y = valueOf(b, state.sort.key);
  if (x === null || y === null) return (x === null) - (y === null);
  const order = typeof x === "string" ? x.localeCompare(y) : x - y;
  return state.sort.up ? order : -order;
}
function drawPrompts() {
  const head = $("prompts").tHead.rows[0], body = $("prompts").tBodies[0];
  const runs = data.runs.filter((run) => data.prompts.some((p) => valueOf(p, run.name) !== null));
  head.replaceChildren();
  for (const column of [{ name: "text", label: "prompt" }, ...runs.map((run) => ({ name: run.name, label: run.name }))]) {
    const cell = make("th", { class: "sort", scope: "col" });
    if (state.sort.key === column.name) cell.setAttribute("aria-sort", state.sort.up ? "ascending" : "descending");
    const button = make("button", { type: "button", "data-key": column.name, text: column.label });
    button.addEventListener("click", () => {
      state.sort = { key: column.name, up: state.sort.key === column.name ? !state.sort.up : true };
      drawPrompts();
      $("prompts").querySelector(`button[data-key="${CSS.escape(column.name)}"]`).focus();
    });
    cell.append(button);
    head.append(cell);
  }
  const all = data.prompts.flatMap((p) => runs.map((run) => valueOf(p, run.name))).filter((v) => v !== null);
  const low = Math.min(...all), high = Math.max(...all);
  body.replaceChildren();
  for (const item of [...data.prompts].sort(compareItems)) {
    const row = make("tr", { "data-index": item.index, class: item.index === state.open ? "chosen" : "" });
    const open = make("button", { type: "button", class: "open", "aria-label": `Show the videos of: ${item.text}` });
    open.append(make("img", { src: item.thumbnail || "data:,", alt: "" }), make("span", { text: item.text + (data.many_seeds ? ` · seed ${item.seed}` : "") }));
    open.addEventListener("click", () => { show(item.index); $("viewer").scrollIntoView(); });
    row.append(make("td", { class: "text" }, open));
    for (const run of runs) {
      const value = valueOf(item, run.name), cell = make("td", { class: "number", text: item.runs[run.name]?.error ? "failed" : number(value, state.figure) });
      if (value !== null && high > low) {
        const share = Math.max(2, 100 * (value - low) / (high - low));
        cell.append(make("span", { class: "bar" }, make("i", { style: `width:${share}%;background:var(${run.colour})` })));
      }
      row.append(cell);
    }
    body.append(row);
  }
}
for (const [name, figure] of Object.entries(data.figures)) {
  if (figure.per_prompt) $("figure").append(make("option", { value: name, text: figure.label }));
}
$("figure").value = state.figure;
$("figure").addEventListener("change", () => {
  state.figure = $("figure").value;
  state.sort.up = data.figures[state.figure].higher_is_better !== false;
  if (state.sort.key !== "text" && !data.prompts.some((p) => valueOf(p, state.sort.key) !== null)) state.sort.key = data.prompts_sort.key;
  drawPrompts();
});

/* ---- viewer: one film holds all runs of a prompt as tiles, so they are in step by construction ---- */
const video = make("video", { playsinline: "", preload: "auto" });
video.muted = true;
video.loop = true;
const canvas = $("canvas"), pen = canvas.getContext("2d", { willReadFrequently: true });
const sides = { a: make("canvas"), b: make("canvas") }; /* one tile each: smoothing cannot draw in the neighbours */
const view = { mode: "slider", a: data.runs[0]?.name, b: data.default_b, split: 0.5, gain: 8, item: null, urls: new Map() };
const frameNow = () => view.item ? Math.min(view.item.frames - 1, Math.max(0, Math.floor(video.currentTime * data.fps + 1e-3))) : 0;

function sourceOf(item) {
  if (!view.urls.has(item.index)) {
    const text = $(`reel-${item.index}`).textContent;
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    view.urls.set(item.index, URL.createObjectURL(new Blob([bytes], { type: "video/mp4" })));
  }
  return view.urls.get(item.index);
}
function show(index) {
  const item = data.prompts.find((p) => p.index === index);
  if (!item || !item.reel) return;
  const playing = !video.paused;
  view.item = item;
  state.open = index;
  for (const row of $("prompts").tBodies[0].rows) row.classList.toggle("chosen", Number(row.dataset.index) === index);
  $("caption").textContent = item.text + (data.many_seeds ? ` · seed ${item.seed}` : "");
  for (const id of ["run-a", "run-b"]) {
    const wanted = id === "run-a" ? view.a : view.b;
    $(id).replaceChildren(...item.reel.runs.map((run) => make("option", { value: run, text: run })));
    $(id).value = item.reel.runs.includes(wanted) ? wanted : item.reel.runs[id === "run-a" ? 0 : item.reel.runs.length - 1];
    view[id === "run-a" ? "a" : "b"] = $(id).value;
  }
  $("scrub").max = item.frames - 1;
  video.src = sourceOf(item);
  if (playing) video.play();
  figures();
  drawCurve();
}
function tile(run) {
  const { runs, columns, width, height } = view.item.reel, place = runs.indexOf(run);
  return [(place % columns) * width, Math.floor(place / columns) * height, width, height];
}
function draw() {
  if (!view.item || video.readyState < 2) return;
  const { width, height } = view.item.reel, beside = view.mode === "beside";
  const scale = Math.max(1, Math.min(4, Math.floor(880 / (beside ? 2 * width : width))));
  const w = width * scale, h = height * scale, gap = beside ? 2 * scale : 0;
  if (canvas.width !== (beside ? 2 * w + gap : w) || canvas.height !== h) { canvas.width = beside ? 2 * w + gap : w; canvas.height = h; }
  pen.imageSmoothingQuality = "high";
  const pens = {};
  for (const side of ["a", "b"]) {
    if (sides[side].width !== width || sides[side].height !== height) { sides[side].width = width; sides[side].height = height; }
    pens[side] = sides[side].getContext("2d", { willReadFrequently: true });
    pens[side].imageSmoothingEnabled = false;
    pens[side].drawImage(video, ...tile(view[side]), 0, 0, width, height);
  }
  if (view.mode === "difference") {
    const a = pens.a.getImageData(0, 0, width, height), b = pens.b.getImageData(0, 0, width, height);
    for (let i = 0; i < a.data.length; i += 4) {
      for (let c = 0; c < 3; c++) a.data[i + c] = 255 - Math.min(255, view.gain * Math.abs(a.data[i + c] - b.data[i + c]));
    }
    pens.a.putImageData(a, 0, 0);
    pen.drawImage(sides.a, 0, 0, w, h);
  } else if (beside) {
    pen.fillStyle = "#000";
    pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.drawImage(sides.a, 0, 0, w, h);
    pen.drawImage(sides.b, w + gap, 0, w, h);
  } else {
    const cut = Math.round(view.split * w);
    pen.drawImage(sides.b, 0, 0, w, h);
    pen.save();
    pen.beginPath();
    pen.rect(0, 0, cut, h);
    pen.clip();
    pen.drawImage(sides.a, 0, 0, w, h);
    pen.restore();
    pen.fillStyle = "rgba(255,255,255,.92)";
    pen.fillRect(cut - 1, 0, 2, h);
  }
  $("scrub").value = frameNow();
  $("count").textContent = `${frameNow() + 1}/${view.item.frames}`;
  movePlayhead();
}
function loop() { draw(); if (!video.paused) requestAnimationFrame(loop); }
video.addEventListener("play", () => { $("play").textContent = "Pause"; loop(); });
video.addEventListener("pause", () => { $("play").textContent = "Play"; draw(); });
for (const name of ["loadeddata", "seeked", "canplay"]) video.addEventListener(name, draw);
video.addEventListener("error", () => { $("count").textContent = "this browser cannot play H.264"; });

function setMode(mode) {
  view.mode = mode;
  for (const button of $("modes").children) button.setAttribute("aria-pressed", button.dataset.mode === mode);
  $("split").hidden = mode !== "slider";
  $("gain-label").hidden = mode !== "difference";
  $("tag-b").hidden = mode === "difference";
  tags();
  draw();
}
function tags() {
  $("tag-a").textContent = view.mode === "difference" ? `|${view.a} − ${view.b}| × ${view.gain}, white is equal` : view.a;
  $("tag-b").textContent = view.b;
}
function setSplit(value) { view.split = Math.min(1, Math.max(0, value)); $("split").value = Math.round(1000 * view.split); draw(); }
function stepTo(frame) {
  video.pause();
  const count = view.item.frames;
  video.currentTime = (((frame % count) + count) % count + 0.5) / data.fps;
}
function toggle() { if (video.paused) video.play(); else video.pause(); }
function next(by) {
  const order = [...$("prompts").tBodies[0].rows].map((row) => Number(row.dataset.index));
  show(order[(order.indexOf(state.open) + by + order.length) % order.length]);
}
$("play").addEventListener("click", toggle);
$("back").addEventListener("click", () => stepTo(frameNow() - 1));
$("forward").addEventListener("click", () => stepTo(frameNow() + 1));
$("scrub").addEventListener("input", () => stepTo(Number($("scrub").value)));
$("rate").addEventListener("change", () => { video.playbackRate = Number($("rate").value); });
$("split").addEventListener("input", () => { view.split = Number($("split").value) / 1000; draw(); });
$("gain").addEventListener("input", () => { view.gain = Number($("gain").value); tags(); draw(); });
for (const button of $("modes").children) button.addEventListener("click", () => setMode(button.dataset.mode));
for (const id of ["run-a", "run-b"]) $(id).addEventListener("change", () => { view[id === "run-a" ? "a" : "b"] = $(id).value; tags(); figures(); drawCurve(); draw(); });
const drag = (event) => { if (event.buttons && view.mode === "slider") { const box = canvas.getBoundingClientRect(); setSplit((event.clientX - box.left) / box.width); } };
canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); drag(event); });
canvas.addEventListener("pointermove", drag);
document.addEventListener("keydown", (event) => {
  const typing = ["INPUT", "SELECT", "TEXTAREA", "SUMMARY"].includes(event.target.tagName);
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const keys = { n: () => next(1), p: () => next(-1), s: () => setMode("slider"), d: () => setMode("difference"), b: () => setMode("beside") };
  if (!typing && !(event.target.tagName === "BUTTON" && event.key === " ")) Object.assign(keys, { " ": toggle, ",": () => stepTo(frameNow() - 1), ".": () => stepTo(frameNow() + 1) });
  if (event.target === canvas) Object.assign(keys, { ArrowLeft: () => setSplit(view.split - 0.02), ArrowRight: () => setSplit(view.split + 0.02) });
  if (event.target.tagName === "SELECT" || !keys[event.key] || !view.item) return;
  event.preventDefault();
  keys[event.key]();
});
function figures() {
  const item = view.item, list = $("figures");
  list.replaceChildren(make("dt", { class: "h", text: "" }), make("dd", { class: "h", text: "left" }), make("dd", { class: "h", text: "right" }));
  for (const [name, figure] of Object.entries(data.figures)) {
    const a = item.runs[view.a]?.figures?.[name], b = item.runs[view.b]?.figures?.[name];
    if (a === undefined && b === undefined) continue;
    list.append(make("dt", { text: figure.label + (figure.unit ? ` (${figure.unit})` : "") }), make("dd", { text: number(a, name) }), make("dd", { text: number(b, name) }));
  }
}

/* ---- PSNR frame by frame, with a playhead ---- */
const CURVE = { width: 880, height: 92, left: 44, right: 8, top: 8, bottom: 18 };
function drawCurve() {
  const box = $("curve");
  box.replaceChildren();
  if (!view.item) return;
  const rows = [["a", view.a], ["b", view.b]].map(([, run]) => ({ run, values: view.item.runs[run]?.frames?.psnr })).filter((row) => row.values && row.run !== "floor");
  box.parentElement.hidden = rows.length === 0;
  if (!rows.length) return;
  const all = rows.flatMap((row) => row.values), low = Math.floor(Math.min(...all) - 1), high = Math.ceil(Math.max(...all) + 1);
  const x = (i) => CURVE.left + i * (CURVE.width - CURVE.left - CURVE.right) / Math.max(1, view.item.frames - 1);
  const y = (v) => CURVE.top + (high - v) * (CURVE.height - CURVE.top - CURVE.bottom) / (high - low);
  for (const v of [low, high]) box.append(make("line", { x1: CURVE.left, x2: CURVE.width - CURVE.right, y1: y(v), y2: y(v), class: "axis" }), make("text", { x: CURVE.left - 8, y: y(v) + 4, "text-anchor": "end", text: v }));
  box.append(make("text", { x: CURVE.left, y: CURVE.height - 2, text: "PSNR by frame, dB" }));
  for (const row of rows) {
    const line = data.runs.find((run) => run.name === row.run).colour;
    box.append(make("path", { d: row.values.map((v, i) => `${i ? "L" : "M"}${x(i).toFixed(1)} ${y(v).toFixed(1)}`).join(""), fill: "none", stroke: `var(${line})`, "stroke-width": 2 }));
    box.append(make("text", { x: CURVE.width - CURVE.right, y: CURVE.height - 2, "text-anchor": "end", text: row.run }));
  }
  box.append(make("line", { id: "playhead", y1: CURVE.top, y2: CURVE.height - CURVE.bottom, stroke: "var(--ink)", "stroke-width": 1.5 }));
  view.x = x;
  movePlayhead();
}
function movePlayhead() {
  const head = $("playhead");
  if (head && view.x) for (const end of ["x1", "x2"]) head.setAttribute(end, view.x(frameNow()));
}

/* ---- heat map: layer x step, or layer x head ---- */
function heatColour(share) {
  const stops = [0, 1, 2, 3].map((i) => colour(`--heat${i}`)), place = Math.min(2.9999, Math.max(0, share * 3)), i = Math.floor(place), f = place - i;
  const rgb = (hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16));
  const [from, to] = [rgb(stops[i]), rgb(stops[i + 1])];
  return `rgb(${from.map((c, k) => Math.round(c + f * (to[k] - c))).join(",")})`;
}
function drawHeat() {
  const layers = data.layers, figure = $("heat-figure").value, across = $("heat-across").value, run = $("heat-run").value;
  const rows = layers.values[run][figure][across], info = layers.figures[figure];
  const columns = rows[0].length, label = across === "steps" ? "step" : "head";
  const left = 150, cell = Math.max(12, Math.min(44, Math.floor(620 / columns))), high = Math.max(16, Math.min(30, Math.floor(460 / rows.length)));
  const box = $("heat"), all = rows.flat(), low = info.share ? 0 : Math.min(...all), top = Math.max(...all);
  const heat = (v) => top === low ? 0 : info.higher_is_better ? (top - v) / (top - low) : (v - low) / (top - low);
  box.replaceChildren();
  box.setAttribute("viewBox", `0 0 ${left + columns * cell + 4} ${rows.length * high + 34}`);
  box.style.maxWidth = `${left + columns * cell + 4}px`;
  const every = Math.ceil(columns / 16), tall = Math.ceil(rows.length / 22);
  rows.forEach((row, i) => {
    if (i % tall === 0) box.append(make("text", { x: left - 10, y: i * high + high / 2 + 4, "text-anchor": "end", text: layers.short[i] }));
    row.forEach((value, j) => {
      const text = info.share ? `${(100 * value).toFixed(2)} %` : `${value.toPrecision(4)} ${info.unit}`;
      const say = `${layers.names[i]}, ${label} ${j}: ${info.label} ${text}`;
      const rect = make("rect", { x: left + j * cell, y: i * high, width: cell, height: high, fill: heatColour(heat(value)), rx: 2, tabindex: i === 0 && j === 0 ? 0 : -1, role: "img", "aria-label": say, "data-row": i, "data-column": j }, make("title", { text: say }));
      for (const name of ["mouseenter", "focus"]) rect.addEventListener(name, () => { $("heat-say").textContent = say; });
      box.append(rect);
    });
  });
  for (let j = 0; j < columns; j += every) box.append(make("text", { x: left + j * cell + cell / 2, y: rows.length * high + 16, "text-anchor": "middle", text: j }));
  box.append(make("text", { x: left + columns * cell / 2, y: rows.length * high + 32, "text-anchor": "middle", text: `denoising ${label}`.replace("denoising head", "head") }));
  $("worst").replaceChildren(...layers.worst[run].map(([name, step, head, share]) => make("li", {}, make("span", { text: `${name}, step ${step}, head ${head}` }), make("span", { text: `${(100 * share).toFixed(1)} %` }))));
  $("heat-total").textContent = layers.total[run];
}
if (data.layers) {
  for (const run of Object.keys(data.layers.values)) $("heat-run").append(make("option", { value: run, text: run }));
  for (const [name, info] of Object.entries(data.layers.figures)) $("heat-figure").append(make("option", { value: name, text: info.label }));
  for (const id of ["heat-run", "heat-figure", "heat-across"]) $(id).addEventListener("change", drawHeat);
  $("heat").addEventListener("keydown", (event) => {
    const move = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!move || event.target.tagName !== "rect") return;
    event.preventDefault();
    const row = Number(event.target.dataset.row) + move[0], column = Number(event.target.dataset.column) + move[1];
    const rect = $("heat").querySelector(`rect[data-row="${row}"][data-column="${column}"]`);
    if (rect) { event.target.setAttribute("tabindex", -1); rect.setAttribute("tabindex", 0); rect.focus(); }
  });
  drawHeat();
}

drawPrompts();
setMode("slider");
const first = [...data.prompts].sort(compareItems).find((item) => item.reel);
if (first) show(first.index);
tags();
