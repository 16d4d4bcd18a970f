// Keeps a page of `fathom board` as it would be if it were loaded now.
"use strict";
const own = document.currentScript.dataset;
const pause = 1000 * Number(own.interval);

function filter() {
  const words = document.getElementById("filter").value.toLowerCase().split(/\s+/);
  for (const row of document.getElementById("rows").rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
  }
}

async function text(address) {
  const answer = await fetch(address, { cache: "no-store" });
  if (!answer.ok) throw new Error(answer.status);
  return answer.text();
}

async function lookAtRuns() {
  const news = document.getElementById("news");
  try {
    document.getElementById("rows").innerHTML = await text("rows");
    filter();
    news.textContent = "";
  } catch {
    news.textContent = "– the board does not answer; what is shown may be old";
  }
}

async function lookAtRun() {
  const place = location.pathname.replace(/^\/run\//, "");
  const version = await text("/version/" + place);
  if (version === own.version) return;
  const page = new DOMParser().parseFromString(await text(location.pathname), "text/html");
  const open = [...document.querySelectorAll("details")].map((part) => part.open);
  document.querySelector("main").replaceWith(page.querySelector("main"));
  document.querySelectorAll("details").forEach((part, index) => { part.open = open[index] ?? false; });
  own.version = version;
}

async function follow(look) {
  if (!document.hidden) await look().catch(() => {});
  setTimeout(follow, pause, look);
}

if (own.version === undefined) {
  document.getElementById("filter").addEventListener("input", filter);
  setTimeout(follow, pause, lookAtRuns);
} else {
  setTimeout(follow, pause, lookAtRun);
}
