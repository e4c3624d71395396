// What every report's page has: themes, rows of buttons, tables that sort.

const root = document.documentElement;
window.addEventListener("error", (event) => { root.dataset.errors = `${root.dataset.errors ?? ""}${event.message}; `; });

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const dark = () => root.dataset.theme === "dark";

// A row of buttons of which one is down.
function choice(host, names, key, after) {
  host.setAttribute("role", "group");
  host.replaceChildren();
  for (const [value, label] of names) {
    const button = element("button", { type: "button", text: label, "aria-pressed": state[key] === value }, host);
    button.onclick = () => { state[key] = value; choice(host, names, key, after); after(); };
  }
}

function setTheme(theme) {
  root.dataset.theme = theme;
}

function themeButton(bar, draw) {
  const button = element("button", { type: "button", title: "light or dark", "aria-label": "light or dark", text: "◐" }, bar);
  button.onclick = () => { setTheme(dark() ? "light" : "dark"); draw(); };
}

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.tabIndex = 0;
    const sort = () => {
      const rising = head.getAttribute("aria-sort") === "descending" || (column === 0 && !head.hasAttribute("aria-sort"));
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const value = (row) => row.cells[column].dataset.value;
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        if (column === 0) return a.cells[0].textContent.localeCompare(b.cells[0].textContent, undefined, { numeric: true });
        return (value(a) === undefined) - (value(b) === undefined) || value(a) - value(b);
      });
      table.tBodies[0].append(...(rising ? rows : rows.reverse()));
    };
    head.onclick = sort;
    head.onkeydown = (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); } };
  });
}

// Draws again when the page's look or width changes; paper is white.
function watchPage(draw) {
  wantsDark.addEventListener("change", () => { setTheme(wantsDark.matches ? "dark" : "light"); draw(); });
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    requestAnimationFrame(draw);
  });
  let before = null;
  addEventListener("beforeprint", () => { before = root.dataset.theme; setTheme("light"); draw(); });
  addEventListener("afterprint", () => { if (before) { setTheme(before); draw(); } });
}

const wantsDark = matchMedia("(prefers-color-scheme: dark)");
setTheme(/theme=(dark|light)/.exec(location.hash)?.[1] ?? (wantsDark.matches ? "dark" : "light"));
