"use strict";
// The page is complete without this, but for what hundreds of small marks say: tooltips, a reader's choice of tasks and seeds,
// steps of histograms, keys, and tables and figures to take away. It asks nothing of any network.
const all = (css, from = document) => [...from.querySelectorAll(css)];
const byId = (id) => document.getElementById(id);
const make = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
};
const NONE = "—", GLUE = "\u00a0", MINUS = "−";

// ---------------------------------------------------------------------------------------------- numbers, as Python writes them

const T = document.body.dataset.t.split(" ").map(Number); // two-sided 95 % quantiles of t, from one degree of freedom on
const pairs = (text) => text.split(" ").map((one) => {
  const at = one.indexOf(":");
  return [one.slice(0, at), Number(one.slice(at + 1))];
});
const fixed = (value, decimals, sign = false) => {
  if (!Number.isFinite(value)) return NONE;
  const size = Math.abs(value), scaled = size * 10 ** decimals;
  // A tie goes to the even digit, as in Python; toFixed takes the larger.
  const tie = scaled % 1 === 0.5 && Math.floor(scaled) % 2 === 0;
  const text = tie ? (Math.floor(scaled) / 10 ** decimals).toFixed(decimals) : size.toFixed(decimals);
  if (!/[1-9]/.test(text)) return text;
  return (value < 0 ? MINUS : sign ? "+" : "") + text;
};
const estimate = (values) => {
  const n = values.length, mean = values.reduce((a, b) => a + b, 0) / n;
  if (n < 2) return { n, mean: n ? mean : NaN, std: NaN };
  const wide = Math.max(...values) - Math.min(...values) > 1e-12;
  const std = wide ? Math.sqrt(values.reduce((sum, v) => sum + (v - mean) ** 2, 0) / (n - 1)) : 0;
  const half = (T[n - 2] ?? 1.96) * std / Math.sqrt(n);
  return { n, mean, std, low: mean - half, high: mean + half };
};
const written = (how, found) => {
  const decimals = parseInt(how.slice(1), 10), sign = how.endsWith("+");
  if (how[0] === "n") return String(found.n);
  if (!found.n) return NONE;
  if (how[0] === "i") {
    if (found.n < 2) return NONE;
    return found.std === 0 ? "seeds equal" : `${fixed(found.low, decimals)} to ${fixed(found.high, decimals)}`;
  }
  const mean = fixed(found.mean, decimals, sign);
  return how[0] === "s" && found.n > 1 ? `${mean}${GLUE}±${GLUE}${fixed(found.std, decimals)}` : mean;
};
const significant = (value) => {
  let text = Number(value.toPrecision(3)).toString();
  if (value && (Math.abs(value) < 1e-4)) text = value.toExponential(2).replace(/\.?0+e/, "e").replace(/e([-+])(\d)$/, "e$10$2");
  return text.replace("-", MINUS);
};
const seedsText = (n) => `${n}${GLUE}seed${n === 1 ? "" : "s"}`;

// ------------------------------------------------------------------------------------------------------ the reader's choice

const chosen = { tasks: null, seeds: null }; // null = all; else a Set of indices of tasks, or of seeds
const has = (seed) => !chosen.seeds || chosen.seeds.has(seed);
const known = (text) => pairs(text).filter(([seed]) => has(seed)).map(([, value]) => value);

const originals = new WeakMap();
const original = (element, read) => {
  if (!originals.has(element)) originals.set(element, read());
  return originals.get(element);
};

// The values behind a number: its own, those of the marks it is among, or those of the cell before it.
const sourceOf = (element) => {
  for (let at = element; at; at = at.tagName === "TD" ? at.previousElementSibling : at.parentElement) if (at.dataset.v) return at;
  return null;
};
const redrawText = () => {
  for (const element of all("[data-f]")) {
    const first = original(element, () => element.textContent);
    const source = sourceOf(element);
    if (source) element.textContent = chosen.seeds ? written(element.dataset.f, estimate(known(source.dataset.v))) : first;
  }
};
const redrawMarks = () => {
  for (const element of all("[data-seed]")) element.classList.toggle("off", !has(element.dataset.seed));
  for (const element of all("[data-b]")) {
    const places = element.dataset.b.split(" ").map((one) => one.split(","));
    const first = original(element, () => places.map(([name]) => element.getAttribute(name)));
    if (!chosen.seeds) {
      places.forEach(([name], i) => element.setAttribute(name, first[i]));
      element.classList.remove("off");
      continue;
    }
    const found = estimate(known(element.closest("[data-v]").dataset.v));
    const of = { m: found.mean, l: found.mean - found.std, h: found.mean + found.std };
    element.classList.toggle("off", places.some(([, what]) => !Number.isFinite(of[what])));
    for (const [name, what, start, per, unit] of places) {
      if (Number.isFinite(of[what])) element.setAttribute(name, `${+(Number(start) + Number(per) * of[what]).toFixed(2)}${unit || ""}`);
    }
  }
  for (const group of all("[data-points]")) redrawCurve(group);
};
const redrawCurve = (group) => {
  const [start, per] = group.dataset.y.split(" ").map(Number), x = group.dataset.x.split(" ");
  const y = (value) => (start + per * value).toFixed(1);
  const found = group.dataset.points.split(";").map((text) => estimate(known(text)));
  const dots = all("circle", group), up = [], down = [], line = [];
  found.forEach((one, i) => {
    dots[i].classList.toggle("off", !one.n);
    if (!one.n) return;
    const std = one.std || 0;
    line.push(`${x[i]} ${y(one.mean)}`);
    up.push(`${x[i]} ${y(one.mean + std)}`);
    down.unshift(`${x[i]} ${y(one.mean - std)}`);
    dots[i].setAttribute("cy", y(one.mean));
  });
  group.querySelector(".line").setAttribute("d", line.length ? `M${line.join("L")}` : "M0 0");
  group.querySelector(".band").setAttribute("d", up.length ? `M${[...up, ...down].join("L")}z` : "M0 0");
};

// Heat maps: one mark a cell in place of one path a shade, so that each can be pointed at.
const maps = new Map(); // group → seed → values
const gridOf = (text) => new Map(text.split(";").map((one) => {
  const at = one.indexOf(":");
  return [one.slice(0, at), one.slice(at + 1).split(",").map(Number)];
}));
const svgElement = (tag) => document.createElementNS(document.querySelector("svg").namespaceURI, tag);
const buildMap = (group) => {
  const [left, top, pitch, cell, column] = group.dataset.at.split(" ").map(Number);
  const heads = Number(group.dataset.heads), layers = Number(group.dataset.layers);
  const rects = [];
  for (let at = 0; at < layers * (heads + 1); at++) {
    const ofHead = at < layers * heads;
    const rect = svgElement("rect");
    rect.setAttribute("class", "cell");
    rect.setAttribute("x", ofHead ? left + (at % heads) * pitch : column);
    rect.setAttribute("y", top + (ofHead ? Math.floor(at / heads) : at - layers * heads) * pitch);
    rect.setAttribute("width", cell);
    rect.setAttribute("height", cell);
    rect.setAttribute("rx", Math.min(3, cell / 6));
    rects.push(rect);
  }
  group.replaceChildren(...rects);
  maps.set(group, gridOf(group.dataset.v));
};
const redrawMaps = () => {
  for (const [group, values] of maps) {
    const mine = [...values].filter(([seed]) => has(seed)).map(([, of]) => of);
    [...group.children].forEach((cell, at) => {
      const found = estimate(mine.map((of) => of[at]));
      cell.classList.toggle("none", !Number.isFinite(found.mean));
      if (Number.isFinite(found.mean)) cell.setAttribute("fill-opacity", +found.mean.toFixed(3));
    });
  }
};
const tipOfCell = (cell) => {
  const group = cell.parentNode, { heat, column, name } = group.dataset;
  const at = [...group.children].indexOf(cell), heads = Number(group.dataset.heads), layers = Number(group.dataset.layers);
  const layer = at < layers * heads ? Math.floor(at / heads) : at - layers * heads;
  const part = at < layers * heads ? ` · head ${at % heads}` : column === "layer" ? "" : ` · ${column}`;
  const where = `layer ${layer}${part}`;
  if (group.dataset.raw && !group.rawValues) group.rawValues = gridOf(group.dataset.raw);
  const values = [...(group.rawValues || maps.get(group))].filter(([seed]) => has(seed)).map(([seed, of]) => [seed, of[at]]);
  const finite = values.filter(([, value]) => Number.isFinite(value));
  const found = estimate(finite.map(([, value]) => value));
  if (heat === "importance") {
    if (!found.n) return `${where}\nno importance stored`;
    return [where, `importance ${significant(found.mean)} (mean of ${seedsText(found.n)})`,
      ...finite.map(([seed, value]) => `seed ${seed}: ${significant(value)}`)].join("\n");
  }
  if (heat === "tasks") {
    return [where, `survives ${fixed(found.mean, 2)} ${name} (mean of ${seedsText(found.n)})`,
      ...finite.map(([seed, value]) => `seed ${seed}: ${value} tasks`)].join("\n");
  }
  const of = column === "neurons" ? "neurons" : "values";
  const said = (value) => heat === "share" ? `${fixed(value, 3)} of its ${of} kept`
    : value === 1 ? "kept" : value === 0 ? "removed" : `kept in ${fixed(value, 2)} of its draws`;
  return [`${where} · ${name}`, `survival ${fixed(found.mean, 3)} (${seedsText(found.n)})`,
    ...finite.map(([seed, value]) => `seed ${seed}: ${said(value)}`)].join("\n");
};

// Histograms: of a seed, at a step.
const stepsOf = (group) => new Map(group.dataset.steps.split("|").map((one) => {
  const at = one.indexOf(":");
  return [one.slice(0, at), one.slice(at + 1).split(";").map((step) => {
    const [counts, cut, title] = step.split("/");
    return { counts: counts.split(",").map(Number), cut: cut === "" ? null : Number(cut), title };
  })];
}));
const showStep = (article) => {
  const slider = article.querySelector(".steps input"), select = article.querySelector(".steps select");
  const seed = select.value, at = Number(slider.value);
  let said = "";
  for (const group of all(".histogram", article)) {
    const steps = group.found.get(seed) || [];
    const step = steps[Math.min(at, steps.length - 1)];
    group.parentNode.classList.toggle("off", !step);
    if (!step) continue;
    const [y0, y] = group.dataset.y.split(" ").map(Number), [x0, x] = group.dataset.x.split(" ").map(Number);
    all(".bar", group).forEach((bar, i) => {
      bar.setAttribute("y", (y0 + y * step.counts[i]).toFixed(1));
      bar.setAttribute("height", (-y * step.counts[i]).toFixed(1));
      const top = Number(group.dataset.top), n = step.counts.length;
      bar.dataset.tip = `${step.counts[i]} of ${step.title.split(": ")[1]}\nimportance ${significant(top * i / n)} to ${significant(top * (i + 1) / n)}`;
    });
    const cut = group.querySelector(".cut");
    cut.setAttribute("visibility", step.cut === null ? "hidden" : "visible");
    if (step.cut !== null) for (const name of ["x1", "x2"]) cut.setAttribute(name, (x0 + x * step.cut).toFixed(1));
    cut.dataset.tip = step.cut === null ? "" : `the next step cut at ${significant(step.cut)}`;
    const caption = group.closest("figure").querySelector("figcaption");
    const first = original(caption, () => caption.textContent);
    const last = at > steps.length - 1 ? " (its last)" : "";
    caption.textContent = `${first}; ${step.title}${last}`;
    said = said || `seed ${seed}, step ${at}`;
  }
  slider.setAttribute("aria-valuetext", said);
  article.querySelector(".steps output").textContent = String(at);
};
const offerSeeds = () => {
  for (const select of all(".steps select")) {
    const offered = JSON.parse(select.dataset.seeds).filter(has), before = select.value;
    select.replaceChildren(...offered.map((seed) => make("option", { value: seed }, seed)));
    if (offered.includes(before)) select.value = before;
    showStep(select.closest("article"));
  }
};

const shown = (element) => {
  const about = element.dataset.task;
  return !chosen.tasks || (about !== "*" && about.split(" ").every((task) => chosen.tasks.has(task)));
};
const applyTasks = () => {
  for (const element of all("[data-task]")) element.classList.toggle("off", !shown(element));
  for (const article of all("article")) { // of which nothing is left
    const mine = all("[data-task]", article);
    article.classList.toggle("off", mine.length > 0 && mine.every((one) => one.classList.contains("off")));
  }
};
const filter = byId("filter");
const boxes = (name) => all(`#filter input[name=${name}]`);
const names = (name, of) => boxes(name).filter((box) => !of || of.has(box.value)).map((box) => box.dataset.name);
const saidOf = () => {
  const tasks = chosen.tasks ? names("tasks", chosen.tasks).join(", ") || "no task" : "all tasks";
  const seeds = chosen.seeds ? `seeds ${names("seeds", chosen.seeds).join(", ") || "none"}` : "all seeds";
  return `${tasks} · ${seeds}`;
};
const apply = () => {
  for (const name of ["tasks", "seeds"]) {
    const every = boxes(name), on = every.filter((box) => box.checked);
    chosen[name] = on.length === every.length ? null : new Set(on.map((box) => box.value));
  }
  applyTasks();
  redrawText();
  redrawMarks();
  redrawMaps();
  offerSeeds();
  document.body.classList.toggle("some-seeds", Boolean(chosen.seeds));
  byId("chosen").textContent = saidOf();
};
const remembered = () => {
  const said = new URLSearchParams();
  for (const name of ["tasks", "seeds"]) if (chosen[name]) said.set(name, names(name, chosen[name]).join(","));
  return said.toString();
};
const remember = (anchor) => {
  const choice = remembered();
  const hash = `#${anchor || ""}${choice ? `?${choice}` : ""}`;
  history.replaceState(null, "", hash === "#" ? location.pathname + location.search : hash);
};
const hashParts = () => {
  const [anchor, choice = ""] = location.hash.slice(1).split("?");
  return [decodeURIComponent(anchor), new URLSearchParams(choice)];
};
const recall = () => {
  const [, said] = hashParts();
  for (const name of ["tasks", "seeds"]) {
    const wanted = said.has(name) ? new Set(said.get(name).split(",")) : null;
    for (const box of boxes(name)) box.checked = !wanted || wanted.has(box.dataset.name);
  }
  apply();
};
const open = (target) => {
  for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  const inner = target.querySelector(":scope > details");
  if (inner && target.classList.contains("case")) inner.open = true;
};
const go = async (anchor, focus = false) => {
  if (anchor && !byId(anchor)) await unpackAll();
  const target = byId(anchor);
  if (!target) return;
  open(target);
  target.scrollIntoView({ behavior: focus ? "instant" : "auto" });
  const heading = target.querySelector("h1, h2, h3");
  if (focus && heading) {
    heading.tabIndex = -1;
    heading.focus({ preventScroll: true });
  }
};

// ---------------------------------------------------------------------------------------------------------------- tooltips

const tip = make("div", { id: "tip", role: "tooltip" });
tip.hidden = true;
document.body.append(tip);
const tellTips = (root) => {
  for (const title of all("svg title", root)) {
    title.parentNode.setAttribute("data-tip", title.textContent);
    title.remove();
  }
  for (const group of all("[data-tips]", root)) {
    group.dataset.tips.split("\n\n").forEach((text, i) => { if (group.children[i]) group.children[i].dataset.tip = text; });
  }
};
const place = (event) => {
  const cell = event.target.closest(".cell"), mark = cell || event.target.closest("[data-tip]");
  const text = cell ? tipOfCell(cell) : mark ? mark.dataset.tip : "";
  tip.hidden = !text;
  if (!text) return;
  if (tip.textContent !== text) tip.textContent = text;
  const { width, height } = tip.getBoundingClientRect();
  const below = event.clientY + 18;
  tip.style.left = Math.max(8, Math.min(event.clientX + 14, document.documentElement.clientWidth - width - 8)) + "px";
  tip.style.top = (below + height > innerHeight ? Math.max(8, event.clientY - height - 12) : below) + "px";
};
for (const kind of ["pointerover", "pointermove", "pointerdown"]) document.addEventListener(kind, place);
document.documentElement.addEventListener("pointerleave", () => { tip.hidden = true; });
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

// --------------------------------------------------------------------------------------------------- tables and figures to take

const escaped = (text, special, how) => [...text.replace(/\s+/g, " ").trim()].map((c) => special.includes(c) ? how(c) : c).join("");
const LATEX = { "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "<": "\\textless{}",
  ">": "\\textgreater{}", "±": "$\\pm$", "−": "$-$", "×": "$\\times$", "·": "$\\cdot$", "–": "--", "—": "---", "Δ": "$\\Delta$" };
const FORMS = {
  Markdown: ([head, ...rows], stubs) => [head.map((c) => escaped(c, "\\`*_[]<>|~&", (x) => `\\${x}`)),
    head.map((_, i) => i < stubs ? "---" : "---:"), ...rows.map((row) => row.map((c) => escaped(c, "\\`*_[]<>|~&", (x) => `\\${x}`)))]
    .map((row) => `| ${row.join(" | ")} |\n`).join(""),
  LaTeX: ([head, ...rows], stubs) => {
    const line = (row) => row.map((c) => escaped(c, "&%$#_{}\\~^<>±−×·–—Δ", (x) => LATEX[x] || `\\${x}`)).join(" & ") + " \\\\";
    const columns = "l".repeat(stubs) + "r".repeat(head.length - stubs);
    return [`\\begin{tabular}{${columns}}`, "\\toprule", line(head), "\\midrule", ...rows.map(line), "\\bottomrule", "\\end{tabular}"]
      .join("\n") + "\n";
  },
  CSV: (rows) => rows.map((row) => row.map((c) => {
    const text = c.replace(/\s+/g, " ").trim();
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }).join(",") + "\r\n").join(""),
};
const linesOf = (table) => all("tr", table).filter((row) => !row.classList.contains("off"))
  .map((row) => [...row.children].map((cell) => cell.textContent));
const copy = async (text, button) => {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = make("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const before = button.textContent;
  button.textContent = "copied";
  setTimeout(() => { button.textContent = before; }, 1200);
};
const offerTables = (root) => {
  for (const region of all(".scroll", root)) {
    const table = region.querySelector("table"), tools = make("div", { class: "tools" });
    const stubs = all("thead th.stub", table).length;
    for (const [name, form] of Object.entries(FORMS)) {
      const button = make("button", { type: "button", title: `Copy this table as ${name}` }, name);
      button.addEventListener("click", () => copy(form(linesOf(table), stubs), button));
      tools.append(button);
    }
    region.after(tools);
  }
};
const standalone = (svg) => {
  const { width, height } = svg.getBoundingClientRect(), copied = svg.cloneNode(true);
  for (const one of all(".off", copied)) one.remove();
  copied.setAttribute("width", Math.round(width));
  copied.setAttribute("height", Math.round(height));
  const painted = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "stroke-linecap", "opacity", "font-size",
    "font-weight", "font-family", "text-anchor", "paint-order"];
  const before = [svg, ...all("*", svg)].filter((one) => !one.closest(".off"));
  [copied, ...all("*", copied)].forEach((one, i) => { // colours as they are seen, without a style sheet
    const style = getComputedStyle(before[i]);
    for (const name of painted) one.setAttribute(name, style.getPropertyValue(name));
    if (one.dataset.tip) {
      const title = svgElement("title");
      title.textContent = one.dataset.tip;
      one.prepend(title);
    }
    for (const { name } of [...one.attributes]) if (name.startsWith("data-") || name === "class") one.removeAttribute(name);
  });
  const ground = svgElement("rect");
  for (const [name, value] of [["width", "100%"], ["height", "100%"], ["fill", getComputedStyle(document.body).backgroundColor]]) {
    ground.setAttribute(name, value);
  }
  copied.prepend(ground);
  return `<?xml version="1.0" encoding="UTF-8"?>\n${new XMLSerializer().serializeToString(copied)}\n`;
};
const offerFigures = (root) => {
  for (const figure of all("figure", root)) {
    const svg = figure.querySelector("svg");
    if (!svg) continue;
    const button = make("button", { type: "button", title: "Download this figure" }, "SVG");
    button.addEventListener("click", () => {
      const article = figure.closest("article"), number = all("figure", article).indexOf(figure) + 1;
      const link = make("a", { download: `${article.id}-${number}.svg` });
      link.href = URL.createObjectURL(new Blob([standalone(svg)], { type: "image/svg+xml" }));
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
    figure.append(make("div", { class: "tools" }, button));
  }
};

// -------------------------------------------------------------------------------------------------------------------- keys

const help = byId("help");
const stops = () => all("header[id], section[id], article[id]").filter((one) => one.offsetParent !== null || one.getClientRects().length);
const step = (by) => {
  const every = stops(), line = 140, focused = document.activeElement.closest("header[id], section[id], article[id]");
  let at = -1;
  every.forEach((one, i) => { if (one.getBoundingClientRect().top <= line) at = i; });
  // Where the page ends a heading cannot come to the top: the one that was stepped to last counts while it is in sight.
  if (every.includes(focused) && Math.abs(focused.getBoundingClientRect().top) < innerHeight) at = every.indexOf(focused);
  const next = every[Math.max(0, Math.min(every.length - 1, at + by))];
  if (!next) return;
  remember(next.id);
  go(next.id, true);
};
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") tip.hidden = true;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (typing && event.key !== "/" && event.key !== "?") return;
  const keys = {
    j: () => step(1), ArrowRight: () => step(1), k: () => step(-1), ArrowLeft: () => step(-1),
    "/": () => { filter.open = true; filter.querySelector("input").focus(); },
    "?": () => { if (help.open) help.close(); else help.showModal(); },
    a: () => { for (const box of [...boxes("tasks"), ...boxes("seeds")]) box.checked = true; apply(); remember(hashParts()[0]); },
  };
  // A table that scrolls sideways has the arrows to itself.
  if (event.key.startsWith("Arrow") && event.target.closest(".scroll")) return;
  if (!keys[event.key]) return;
  event.preventDefault();
  keys[event.key]();
});
byId("close-help").addEventListener("click", () => help.close());
byId("open-help").addEventListener("click", () => help.showModal());

// ------------------------------------------------------------------------------------------------------------------- start

const begin = (root) => {
  tellTips(root);
  for (const group of all("[data-heat]", root)) buildMap(group);
  for (const holder of all(".steps", root)) beginSteps(holder);
  offerTables(root);
  offerFigures(root);
};
const beginSteps = (holder) => {
  const article = holder.closest("article"), groups = all(".histogram", article);
  for (const group of groups) group.found = stepsOf(group);
  const seeds = [...new Set(groups.flatMap((group) => [...group.found.keys()]))];
  const longest = Math.max(...groups.flatMap((group) => [...group.found.values()].map((steps) => steps.length)));
  holder.querySelector("select").dataset.seeds = JSON.stringify(seeds);
  const slider = holder.querySelector("input");
  slider.max = String(longest - 1);
  slider.value = "0";
  for (const one of [slider, holder.querySelector("select")]) one.addEventListener("input", () => showStep(article));
  holder.hidden = false;
};
// Sections of a large page are packed; those in sight are opened at the start, others with their details.
const unpack = async (holder) => {
  if (!holder.dataset.packed) return;
  const bytes = Uint8Array.from(atob(holder.dataset.packed), (c) => c.charCodeAt(0));
  delete holder.dataset.packed;
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  holder.innerHTML = await new Response(stream).text();
  begin(holder);
};
const unpackAll = async (from = document) => {
  const holders = all("[data-packed]", from);
  await Promise.all(holders.map(unpack));
  if (holders.length) apply();
};
if (filter) {
  filter.hidden = boxes("tasks").length < 2 && boxes("seeds").length < 2;
  filter.addEventListener("change", () => { apply(); remember(hashParts()[0]); });
  byId("show-all").addEventListener("click", () => {
    for (const box of [...boxes("tasks"), ...boxes("seeds")]) box.checked = true;
    apply();
    remember(hashParts()[0]);
  });
}
addEventListener("hashchange", () => {
  const [anchor, said] = hashParts();
  if ([...said].length) recall();
  else if (chosen.tasks || chosen.seeds) remember(anchor); // a link to a section keeps the choice
  go(anchor);
});
const start = async () => {
  begin(document);
  for (const details of all("details:has(> [data-packed])")) {
    details.addEventListener("toggle", () => { if (details.open) unpackAll(details); });
  }
  await Promise.all(all("section > [data-packed]").map(unpack));
  recall();
  if (hashParts()[0]) go(hashParts()[0]);
  document.documentElement.dataset.ready = "";
};
start();
