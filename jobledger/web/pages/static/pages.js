// What the pages do beyond links and forms: local and relative times, the switch of colours, and one event stream a page
// that refreshes the part of the page that changes. Every page can be read, and every form works, without this file.
(() => {
  "use strict";
  const root = document.documentElement;
  const say = (text) => { const at = document.getElementById("said"); if (at) at.textContent = text; };

  // -- times ----------------------------------------------------------------------------------------------------
  const local = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
  const duration = (s) => {
    if (s < 1) return `${Math.round(s * 1000)} ms`;
    if (s < 60) return `${s.toFixed(0)} s`;
    const two = (big, bigName, small, smallName) => {
      const a = Math.floor(s / big), b = Math.floor((s % big) / small);
      return b ? `${a} ${bigName} ${b} ${smallName}` : `${a} ${bigName}`;
    };
    if (s < 3600) return two(60, "min", 1, "s");
    if (s < 172800) return two(3600, "h", 60, "min");
    return two(86400, "d", 3600, "h");
  };
  const fill = (within) => {
    for (const at of within.querySelectorAll("time[datetime]")) {
      const when = new Date(at.dateTime);
      if (Number.isNaN(when.getTime())) continue;
      if (at.dataset.form === "ago") {
        const seconds = (Date.now() - when.getTime()) / 1000;
        at.textContent = seconds >= 0 ? `${duration(seconds)} ago` : `in ${duration(-seconds)}`;
      } else if (at.dataset.form === "local") {
        at.textContent = local.format(when);
        const line = at.closest("[hidden]");
        if (line) line.hidden = false;
      }
      if (!at.title) at.title = `${local.format(when)} (local time)`;
    }
  };

  // -- colours --------------------------------------------------------------------------------------------------
  const themes = ["system", "light", "dark"];
  const theme = document.getElementById("theme");
  const showTheme = () => { if (theme) theme.textContent = `Colours: ${root.dataset.theme || "system"}`; };
  if (theme) {
    theme.hidden = false;
    theme.addEventListener("click", () => {
      const next = themes[(themes.indexOf(root.dataset.theme || "system") + 1) % themes.length];
      if (next === "system") delete root.dataset.theme; else root.dataset.theme = next;
      try { localStorage.setItem("jobledger-theme", next); } catch { /* storage may be off */ }
      showTheme();
      document.body.dispatchEvent(new Event("jl:theme"));
    });
    showTheme();
  }

  // -- the event stream -----------------------------------------------------------------------------------------
  const LEAST_MS = 2000, POLL_MS = 5000, AGAIN_MS = 30000;
  const live = document.getElementById("live");
  const button = document.getElementById("pause");
  let stream = null, paused = false, last = 0, timer = 0, poll = 0;
  const refresh = () => {
    timer = 0;
    // What somebody types or reads with the keyboard is not replaced.
    const at = document.activeElement;
    if (paused || document.hidden || (at && live.contains(at) && at.matches("input, select, textarea"))) return;
    last = Date.now();
    document.body.dispatchEvent(new Event("jl:refresh"));
  };
  const soon = () => { if (!timer) timer = setTimeout(refresh, Math.max(0, last + LEAST_MS - Date.now())); };
  const show = (state) => {
    root.dataset.live = state;
    const words = { live: "Live", polling: "Every 5 s", paused: "Paused" };
    const label = document.getElementById("live-label");
    if (label) label.textContent = words[state];
    if (button) button.setAttribute("aria-pressed", String(state === "paused" && paused));
  };
  const close = () => { if (stream) stream.close(); stream = null; clearInterval(poll); poll = 0; };
  const open = () => {
    close();
    if (paused || document.hidden) { show("paused"); return; }
    const fallBack = () => { if (!poll) { poll = setInterval(soon, POLL_MS); show("polling"); } };
    stream = new EventSource(live.dataset.events);
    stream.addEventListener("open", () => { clearInterval(poll); poll = 0; show("live"); });
    for (const name of ["message", "ready", "job", "gap"]) stream.addEventListener(name, soon);
    stream.addEventListener("error", () => {
      fallBack();
      if (stream && stream.readyState === EventSource.CLOSED) {
        stream = null;
        setTimeout(() => { if (!stream && !paused && !document.hidden) open(); }, AGAIN_MS);
      }
    });
    fallBack();
  };
  if (live && live.dataset.events && button) {
    button.hidden = false;
    button.addEventListener("click", () => {
      paused = !paused;
      say(paused ? "Live updates are paused." : "Live updates continue.");
      open();
      if (!paused) soon();
    });
    document.addEventListener("visibilitychange", () => { open(); if (!document.hidden) soon(); });
    addEventListener("pagehide", close);
    addEventListener("pageshow", (event) => { if (event.persisted) open(); });
    // Counters change without an event of a job, too: what runs becomes late, a worker becomes silent.
    setInterval(() => { if (!paused && !document.hidden) soon(); }, 15000);
    open();
  }

  // -- forms ----------------------------------------------------------------------------------------------------
  // Fields without a value would only make the address of a filter long.
  document.addEventListener("submit", (event) => {
    const form = event.target;
    if (form.method === "get") for (const each of form.elements) if (each.name && !each.value) each.disabled = true;
    if (form.method === "post") setTimeout(() => { for (const each of form.querySelectorAll("button")) each.disabled = true; });
  });
  addEventListener("pageshow", () => {
    for (const each of document.querySelectorAll("form :disabled")) each.disabled = false;
  });

  fill(document);
  setInterval(() => fill(document), 10000);
  document.addEventListener("htmx:after:swap", () => fill(document));
})();
