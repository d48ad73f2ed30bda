// The chart of the overview: jobs per second, as the server measured them. The same figures are in a table beside it.
(() => {
  "use strict";
  const at = document.getElementById("chart");
  if (!at || typeof uPlot === "undefined") return;
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  let chart = null, data = [[], [], [], []];
  const options = () => {
    const grid = { stroke: style("--rule"), width: 1 }, ticks = { stroke: style("--rule"), width: 1, size: 4 };
    const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", hour12: false });
    const axis = { stroke: style("--dim"), grid, ticks, font: "11px system-ui, sans-serif" };
    return {
      width: Math.max(at.clientWidth, 200),
      height: 200,
      cursor: { points: { size: 7 } },
      scales: { y: { range: (self, low, high) => [0, Math.max(high * 1.1, 1)] } },
      axes: [{ ...axis, values: (self, values) => values.map((v) => clock.format(new Date(v * 1000))) }, { ...axis, size: 54, values: (self, values) => values.map((v) => (v >= 10 || v % 1 === 0 ? v.toFixed(0) : v.toFixed(1))) }],
      series: [
        { label: "local time", value: (self, v) => (v == null ? "–" : clock.format(new Date(v * 1000))) },
        { label: "submitted/s", stroke: style("--s-queued"), width: 1.5, dash: [5, 3] },
        { label: "succeeded/s", stroke: style("--s-succeeded"), width: 2 },
        { label: "failed/s", stroke: style("--s-failed"), width: 2, dash: [2, 2] },
      ],
    };
  };
  const draw = () => {
    if (chart) chart.destroy();
    at.textContent = "";
    chart = new uPlot(options(), data, at);
  };
  const load = async () => {
    try {
      const answer = await fetch(at.dataset.url, { credentials: "same-origin" });
      if (!answer.ok) return;
      data = await answer.json();
    } catch { return; }
    if (!data[0].length) return;
    if (chart) chart.setData(data); else draw();
  };
  new ResizeObserver(() => { if (chart) chart.setSize({ width: Math.max(at.clientWidth, 200), height: 200 }); }).observe(at);
  document.body.addEventListener("jl:refresh", load);
  document.body.addEventListener("jl:theme", () => { if (chart) draw(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (chart) draw(); });
  load();
})();
