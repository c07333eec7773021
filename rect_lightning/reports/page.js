"use strict";
(() => {
  const make = (name, text, click) => {
    const element = document.createElement(name);
    element.textContent = text;
    element.type = "button";
    element.addEventListener("click", click);
    return element;
  };
  const remember = { get: () => { try { return localStorage.getItem("theme"); } catch { return null; } },
                     set: (theme) => { try { localStorage.setItem("theme", theme); } catch { /* a page without storage */ } } };

  // light or dark
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const toggle = make("button", "", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remember.set(root.dataset.theme);
    tell();
  });
  const tell = () => { toggle.textContent = isDark() ? "Light" : "Dark"; };
  toggle.className = "theme";
  toggle.setAttribute("aria-label", "Switch between light and dark");
  if (["light", "dark"].includes(remember.get())) root.dataset.theme = remember.get();
  system.addEventListener("change", tell);
  tell();
  document.querySelector("header").prepend(toggle);

  // downloads
  const save = (name, type, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  const csv = (table) => [...table.rows].map((row) => [...row.cells].map((cell) => {
    const text = cell.querySelector("data")?.value ?? cell.textContent.trim();
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }).join(",")).join("\r\n") + "\r\n";
  const svg = (figure) => {  // its panels side by side, two in a row
    const panels = [...figure.querySelectorAll("svg.panel")];
    const columns = Math.min(2, panels.length);
    let top = 0, row = 0;
    const inside = panels.map((panel, i) => {
      const { width, height } = panel.viewBox.baseVal;
      if (i % columns === 0) { top += row; row = 0; }
      row = Math.max(row, height);
      const copy = panel.cloneNode(true);
      for (const [name, value] of Object.entries({ x: (i % columns) * width, y: top, width, height })) copy.setAttribute(name, value);
      return new XMLSerializer().serializeToString(copy);
    }).join("\n").replace(/var\(--[\w-]+, (#\w+)\)/g, "$1");
    const [width, height] = [columns * panels[0].viewBox.baseVal.width, top + row];
    return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}">\n${inside}\n</svg>\n`;
  };
  for (const figure of document.querySelectorAll("figure")) {
    const tools = document.createElement("div");
    const title = figure.querySelector("h3").textContent;
    tools.className = "tools";
    tools.append(
      make("button", "SVG", () => save(`${figure.id}.svg`, "image/svg+xml", svg(figure))),
      make("button", "CSV", () => save(`${figure.id}.csv`, "text/csv", csv(figure.querySelector("table")))),
    );
    for (const button of tools.children) button.setAttribute("aria-label", `Save ${button.textContent} of ${title}`);
    figure.querySelector(".foot").append(tools);
  }
})();
