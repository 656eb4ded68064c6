const figures = JSON.parse(document.getElementById("figures").textContent);
const options = { responsive: true, displaylogo: false, displayModeBar: false };
for (const place of document.querySelectorAll("[data-figure]")) {
  const figure = figures[place.dataset.figure];
  if (figure.data.length) { Plotly.newPlot(place, figure.data, figure.layout, options); }
  else { place.textContent = "no data in these records"; }
}
