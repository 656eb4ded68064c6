// What a script of the page holds as gzip in base64, as a stream.
async function unpacked(id) {
  const packed = Uint8Array.from(atob(document.getElementById(id).textContent.trim()), (letter) => letter.charCodeAt(0));
  return new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
}

// Numbers in a text, for sorting: "36.0 KB", "1 min 15 s", "0.755 ± 0.007", "10%"; texts without a number come last.
const units = { B: 1, KB: 1e3, MB: 1e6, GB: 1e9, TB: 1e12, ms: 1e-3, s: 1, min: 60, h: 3600 };
function amount(text) {
  let total = null;
  for (const [, number, unit] of text.split("±")[0].matchAll(/([-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?)\s*([A-Za-z]*)/g)) {
    total = (total ?? 0) + parseFloat(number.replaceAll(",", "")) * (units[unit] ?? 1);
  }
  return total;
}
function compared(a, b) {
  const [x, y] = [amount(a), amount(b)];
  return x === null || y === null ? (x === null) - (y === null) || a.localeCompare(b) : x - y;
}

function sortBy(table, column, descending) {
  const isName = column === 0 || table.tHead.rows[0].cells[column].dataset.kind === "name";
  const body = table.tBodies[0];
  const order = isName ? (a, b) => a.localeCompare(b, "en", { numeric: true }) : compared;
  const rows = [...body.rows].map((row) => [row.cells[column].textContent.trim(), row]);
  const unknown = ([text]) => !isName && amount(text) === null;
  rows.sort((a, b) => unknown(a) - unknown(b) || (descending ? -1 : 1) * order(a[0], b[0]));
  body.append(...rows.map(([, row]) => row));
  [...table.tHead.rows[0].cells].forEach((head, number) => {
    if (number === column) { head.setAttribute("aria-sort", descending ? "descending" : "ascending"); }
    else { head.removeAttribute("aria-sort"); }
  });
}
function makeSortable(table) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.title = `Sort by ${head.textContent}`;
    button.onclick = () => sortBy(table, column, head.getAttribute("aria-sort") === "ascending");
    head.replaceChildren(button);
  });
}
document.querySelectorAll("table.sortable").forEach(makeSortable);

// Heat maps: a table of one group of values at a time, with a choice of the group and a search for rows.
function shown(value, unit) {
  if (value === null) { return "-"; }
  if (unit !== "bytes") { return value.toLocaleString("en", { maximumFractionDigits: 2 }); }
  for (const [name, size] of [["GB", 1e9], ["MB", 1e6], ["KB", 1e3]]) { if (value >= size) { return `${(value / size).toFixed(1)} ${name}`; } }
  return `${value} B`;
}
function fillHeat(place, heat, group) {
  const table = document.createElement("table");
  table.className = "heat";
  table.setAttribute("aria-label", `${heat.title}: ${group.name}`);
  const head = table.createTHead().insertRow();
  for (const name of [heat.rows_name, ...group.columns]) {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = name;
    head.append(cell);
  }
  const body = table.createTBody();
  heat.rows.forEach((name, number) => {
    const row = body.insertRow(), first = document.createElement("th");
    first.scope = "row";
    first.textContent = name;
    row.append(first);
    for (const value of group.values[number]) {
      const cell = row.insertCell();
      cell.textContent = shown(value, group.unit);
      cell.style.setProperty("--share", shareOf(value, group).toFixed(3));
    }
  });
  makeSortable(table);
  place.replaceChildren(table);
}
const shareOf = (value, group) => {
  const scale = group.unit ? Math.log1p : (x) => x;
  return value === null ? 0 : scale(value) / (scale(group.top) || 1);
};
// All rows of a long heat map at a glance: a strip for each column, a line for each row.
function fillStrips(place, heat, group) {
  place.hidden = heat.rows.length <= 60;
  if (place.hidden) { return; }
  const color = getComputedStyle(document.documentElement).getPropertyValue("--heat").trim();
  place.replaceChildren(`All ${heat.rows.length.toLocaleString("en")} at a glance, in the order of the table below:`, ...group.columns.map((name, column) => {
    const strip = document.createElement("canvas"), line = document.createElement("p");
    [strip.width, strip.height] = [heat.rows.length, 1];
    strip.setAttribute("role", "img");
    strip.setAttribute("aria-label", `${group.name} of all ${heat.rows.length} rows for ${name}, in the order of the table below`);
    const paint = strip.getContext("2d");
    group.values.forEach((row, number) => {
      paint.fillStyle = `rgb(${color} / ${shareOf(row[column], group)})`;
      paint.fillRect(number, 0, 1, 1);
    });
    line.append(name, strip);
    return line;
  }));
}
function showHeat(place, heat) {
  const box = place.querySelector(".scroll"), choice = place.querySelector("select"), wanted = place.querySelector("input");
  const count = place.querySelector("[role=status]"), strips = place.querySelector(".strips");
  const filter = () => {
    const rows = [...box.querySelectorAll("tbody tr")], text = wanted.value.toLowerCase();
    for (const row of rows) { row.hidden = !row.cells[0].textContent.toLowerCase().includes(text); }
    count.textContent = `${rows.filter((row) => !row.hidden).length.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
  };
  const fill = () => {
    const group = heat.groups[choice.selectedIndex];
    fillStrips(strips, heat, group);
    fillHeat(box, heat, group);
    filter();
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => fillStrips(strips, heat, heat.groups[choice.selectedIndex]));
  choice.replaceChildren(...heat.groups.map((group) => new Option(group.name)));
  choice.onchange = fill;
  wanted.oninput = filter;
  fill();
}
const places = [...document.querySelectorAll("[data-heat]")];
if (places.length) {
  unpacked("heat").then(async (stream) => {
    const heats = await new Response(stream).json();
    for (const place of places) { showHeat(place, heats[place.dataset.heat]); }
  });
}

// What a point of a chart says: the nearest one within reach of the pointer.
for (const chart of document.querySelectorAll(".chart")) {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  chart.append(tip);
  const pick = (name) => {
    for (const part of chart.querySelectorAll("[data-series]")) { part.classList.toggle("picked", part.dataset.series === name); }
  };
  chart.addEventListener("pointermove", (event) => {
    let nearest = null, least = 22;
    for (const mark of chart.querySelectorAll("[data-tip]")) {
      const box = mark.getBoundingClientRect();
      const x = Math.max(box.left - event.clientX, 0, event.clientX - box.right);
      const y = Math.max(box.top - event.clientY, 0, event.clientY - box.bottom);
      if (Math.hypot(x, y) < least) { [nearest, least] = [mark, Math.hypot(x, y)]; }
    }
    tip.hidden = nearest === null;
    pick((nearest ?? event.target).closest("[data-series]")?.dataset.series);
    if (nearest === null) { return; }
    const place = chart.getBoundingClientRect();
    tip.textContent = nearest.dataset.tip;
    tip.style.left = `${Math.max(0, Math.min(event.clientX - place.left + 14, place.width - tip.offsetWidth))}px`;
    tip.style.top = `${event.clientY - place.top + 16}px`;
  });
  chart.addEventListener("pointerleave", () => { tip.hidden = true; pick(null); });
}

document.getElementById("download")?.addEventListener("click", async () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await new Response(await unpacked("records")).blob());
  link.download = "records.json";
  link.click();
});
