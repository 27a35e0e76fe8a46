// Fetches the page again and puts the new one in place: what is open stays open, the focus stays where it is.
// A page that could not be renewed says so, for an old one must not pass for the present.
(() => {
  const every = Number(document.documentElement.dataset.refresh) * 1000;
  let timer = 0;

  const opened = () => [...document.querySelectorAll("details[open][id]")].map((each) => each.id);

  function replace(text) {
    const fresh = new DOMParser().parseFromString(text, "text/html").getElementById("page");
    const open = opened();
    const focused = document.activeElement && document.activeElement.id;
    const paused = document.getElementById("pause").checked;
    const scrolled = [...document.querySelectorAll(".scroll[id]")].map((each) => [each.id, each.scrollLeft]);
    document.getElementById("page").replaceWith(fresh);
    for (const id of open) document.getElementById(id)?.setAttribute("open", "");
    for (const [id, left] of scrolled) if (document.getElementById(id)) document.getElementById(id).scrollLeft = left;
    if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
    document.getElementById("pause").checked = paused;
    tell("");
  }

  function tell(text) {
    document.getElementById("renewal").textContent = text;
    document.getElementById("renewal").hidden = !text;
  }

  async function renew() {
    const pause = document.getElementById("pause");
    // Text that somebody is marking is not taken from under them.
    if (pause.checked || document.hidden || !getSelection().isCollapsed) return;
    try {
      const answer = await fetch(location.href, { cache: "no-store" });
      const text = await answer.text();
      if (!answer.ok) throw new Error(`it answered ${answer.status}`);
      if (!document.getElementById("pause").checked) replace(text);
    } catch (error) {
      tell(`Not renewed since the time above: the dashboard cannot be reached, or ${error.message}.`);
    }
  }

  function again() {
    clearTimeout(timer);
    timer = setTimeout(async () => { await renew(); again(); }, every);
  }

  document.addEventListener("visibilitychange", () => { if (!document.hidden) renew(); });
  again();
})();
