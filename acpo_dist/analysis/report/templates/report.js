"use strict";
(() => {
  const all = (query, within = document) => [...within.querySelectorAll(query)];

  // Charts: the colours of the light scheme in each figure are swapped for those of the reader's scheme.
  const colours = JSON.parse(document.getElementById("colours").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const swapped = (text) => !dark.matches ? text : Object.entries(colours.light).reduce(
    (result, [name, colour]) => result.replaceAll(colour, colours.dark[name]), text);
  const draw = (chart) => {
    const { data, layout } = JSON.parse(swapped(chart.dataset.chart));
    Plotly.react(chart, data, layout, { responsive: true, displaylogo: false, modeBarButtons: [["toImage"]] });
  };
  // A hidden chart has no size, so it is drawn when it is shown.
  const drawVisible = () => all(".chart").filter((chart) => chart.clientWidth && !chart.data).forEach(draw);
  dark.addEventListener("change", () => all(".chart").filter((chart) => chart.data).forEach(draw));

  // Read-out under a chart, for the pointer and for arrow keys: one stop per x of curves, one per point otherwise.
  const number = (value) => (value === null || value === undefined ? "no value" : String(+value.toPrecision(4)));
  const stops = (chart) => {
    const points = chart.data.flatMap((trace, curveNumber) => trace.hoverinfo === "skip" ? [] : trace.type === "heatmap"
      ? trace.customdata.flatMap((row, y) => row.map((text, x) => ({ text, curveNumber, pointNumber: [y, x] })))
      : trace.y.map((y, pointNumber) => trace.type === "bar"
        ? { text: `${y}: ${trace.text[pointNumber]}`, curveNumber, pointNumber }
        : { text: trace.text ? trace.text[pointNumber] : `${trace.name} ${number(y)}`, x: trace.x[pointNumber], y, curveNumber, pointNumber }));
    if (chart.layout.hovermode !== "x unified") return points.filter((point) => point.text).map((point) => ({ text: point.text, points: [point] }));
    return [...new Set(points.map((point) => point.x))].sort((a, b) => a - b).map((x) => {
      const here = points.filter((point) => point.x === x);
      return {
        text: `${chart.layout.xaxis.title.text} ${x}: ${here.map((point) => point.text).join(", ")}`,
        points: here.filter((point) => point.y !== null),
      };
    });
  };
  for (const chart of all(".chart")) {
    const output = chart.nextElementSibling;
    let at = null;
    const read = (index) => {
      const known = stops(chart);
      at = Math.max(0, Math.min(known.length - 1, index));
      output.textContent = known[at].text;
      return known[at];
    };
    chart.addEventListener("keydown", (event) => {
      const last = stops(chart).length - 1;
      const next = { ArrowRight: (at ?? -1) + 1, ArrowLeft: (at ?? last + 1) - 1, Home: 0, End: last }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      const points = read(next).points.map(({ curveNumber, pointNumber }) => ({ curveNumber, pointNumber }));
      if (points.length) Plotly.Fx.hover(chart, points);
    });
    chart.addEventListener("pointermove", () => {
      const hovered = chart._hoverdata?.[0];
      if (!hovered) return;
      const same = ({ curveNumber, pointNumber }) => curveNumber === hovered.curveNumber && String(pointNumber) === String(hovered.pointNumber);
      const index = stops(chart).findIndex((stop) => stop.points.some(same));
      if (index >= 0) read(index);
    });
  }

  // Sliders: the share of the image, from the left, that shows the base model.
  const wipe = (input) => input.closest(".wipe").style.setProperty("--cut", input.value + "%");
  for (const input of all(".wipe input")) {
    wipe(input);
    input.addEventListener("input", () => wipe(input));
  }
  for (const master of all("[data-all]")) {
    master.addEventListener("input", () => all(".wipe input", master.closest("section")).forEach((input) => {
      input.value = master.value;
      wipe(input);
    }));
  }

  // Orders of the images.
  for (const button of all("[data-order]")) {
    button.addEventListener("click", () => {
      for (const other of button.parentElement.children) other.setAttribute("aria-pressed", String(other === button));
      const gallery = button.closest("section").querySelector(".gallery");
      const order = button.dataset.order;
      const place = (card) => (order === "prompt" ? +card.dataset.prompt : (order === "best" ? -1 : 1) * +card.dataset.worst);
      gallery.append(...[...gallery.children].sort((a, b) => place(a) - place(b)));
    });
  }

  // Tabs, by the usual keys.
  const tabs = all("[role=tab]");
  const show = (chosen) => {
    for (const tab of tabs) {
      const on = tab === chosen;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
      document.getElementById(tab.getAttribute("aria-controls")).hidden = !on;
    }
    drawVisible();
  };
  tabs.forEach((tab, index) => {
    tab.addEventListener("click", () => show(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const next = step ? tabs[(index + step + tabs.length) % tabs.length]
        : event.key === "Home" ? tabs[0] : event.key === "End" ? tabs[tabs.length - 1] : null;
      if (!next) return;
      event.preventDefault();
      show(next);
      next.focus();
    });
  });
  drawVisible();
})();
