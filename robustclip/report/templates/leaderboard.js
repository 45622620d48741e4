for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  table.tHead.querySelectorAll("button").forEach((button) => {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const falls = head.getAttribute("aria-sort") !== "descending";
      table.tHead.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", falls ? "descending" : "ascending");
      const value = (row) => row.cells[head.cellIndex].dataset.order;
      const compare = (a, b) => isNaN(a) || isNaN(b) ? b.localeCompare(a) : b - a;
      const rows = [...body.rows].sort((a, b) => (falls ? 1 : -1) * compare(value(a), value(b)));
      const failed = (row) => row.classList.contains("failed");
      body.append(...rows.filter((row) => !failed(row)), ...rows.filter(failed));
    });
  });
}
