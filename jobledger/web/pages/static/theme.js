// Sets the colours that were chosen in this browser before the page is drawn. Without a choice the system decides.
(() => {
  "use strict";
  let choice = null;
  try { choice = localStorage.getItem("jobledger-theme"); } catch { /* storage may be off */ }
  if (choice === "light" || choice === "dark") document.documentElement.dataset.theme = choice;
})();
