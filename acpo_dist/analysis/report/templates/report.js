"use strict";
(() => {
  // Sliders: the share of the image, from the left, that shows the base model.
  const wipe = (input) => input.closest(".wipe").style.setProperty("--cut", input.value + "%");
  for (const input of document.querySelectorAll(".wipe input")) {
    wipe(input);
    input.addEventListener("input", () => wipe(input));
  }
  for (const all of document.querySelectorAll("[data-all]")) {
    all.addEventListener("input", () => {
      for (const input of all.closest("section").querySelectorAll(".wipe input")) {
        input.value = all.value;
        wipe(input);
      }
    });
  }

  // Orders of the images.
  for (const button of document.querySelectorAll("[data-order]")) {
    button.addEventListener("click", () => {
      for (const other of button.parentElement.children) other.setAttribute("aria-pressed", String(other === button));
      const shelf = button.closest("section").querySelector(".shelf");
      const order = button.dataset.order;
      const place = (card) => (order === "prompt" ? +card.dataset.prompt : (order === "best" ? -1 : 1) * +card.dataset.worst);
      shelf.append(...[...shelf.children].sort((a, b) => place(a) - place(b)));
    });
  }

  // Tabs, by the usual keys.
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const show = (chosen) => {
    for (const tab of tabs) {
      const on = tab === chosen;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
      document.getElementById(tab.getAttribute("aria-controls")).hidden = !on;
    }
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

  // Read-out of a chart under the pointer, or by arrow keys.
  const text = (value) => (value === null || value === undefined ? "no figure" : String(+value.toPrecision(4)));
  for (const chart of document.querySelectorAll("svg[data-chart]")) {
    const data = JSON.parse(chart.dataset.chart);
    const cursor = chart.querySelector(".cursor");
    const output = chart.nextElementSibling;
    let at = data.x.length - 1;
    const read = (index) => {
      at = Math.max(0, Math.min(data.x.length - 1, index));
      cursor.removeAttribute("hidden");
      cursor.setAttribute("x1", data.at[at]);
      cursor.setAttribute("x2", data.at[at]);
      output.textContent = `${data.label} ${data.x[at]}: ` + data.series.map((s) => `${s.name} ${text(s.values[at])}`).join(", ");
    };
    chart.addEventListener("pointermove", (event) => {
      const box = chart.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * chart.viewBox.baseVal.width;
      let nearest = 0;
      data.at.forEach((place, index) => { if (Math.abs(place - x) < Math.abs(data.at[nearest] - x)) nearest = index; });
      read(nearest);
    });
    chart.addEventListener("keydown", (event) => {
      const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: data.x.length - 1 }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      read(next);
    });
  }
})();
