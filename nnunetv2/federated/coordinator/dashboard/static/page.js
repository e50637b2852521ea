"use strict";
/* The page of a coordinator: log in, look, stay up to date. It asks for nothing outside of this coordinator, keeps
   nothing in the browser, and puts what it is told on the screen as text, never as markup. */
(() => {
  const base = location.pathname.replace(/\/*$/, "/"); // whatever prefix a proxy adds
  const byId = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";

  // ------------------------------------------------------------------------------------------------ small helpers
  function h(tag, options = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(options)) {
      if (value === null || value === undefined) continue;
      if (name === "class") node.className = value;
      else if (name in node && name !== "list") node[name] = value;
      else node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }
  function s(tag, attributes = {}, ...children) {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }
  const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));

  function duration(seconds) {
    const whole = Math.max(0, Math.round(seconds));
    const parts = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]]
      .map(([size, unit], i, all) => [Math.floor((i ? whole % all[i - 1][0] : whole) / size), unit]);
    const first = parts.findIndex(([count]) => count > 0);
    if (first < 0) return "0\u00a0s";
    return parts.slice(first, first + 2).filter(([count]) => count > 0).map(([n, unit]) => `${n}\u00a0${unit}`).join(" ");
  }
  function bytes(count) {
    const units = ["B", "kB", "MB", "GB", "TB", "PB"];
    const i = count < 1000 ? 0 : Math.min(units.length - 1, Math.floor(Math.log10(count) / 3));
    return `${(count / 1000 ** i).toFixed(i && count / 1000 ** i < 100 ? 1 : 0)}\u00a0${units[i]}`;
  }
  function decimals(value, digits) {
    const text = value.toFixed(digits);
    return (Number(text) === 0 ? (0).toFixed(digits) : text).replace("-", "−");
  }
  const dice = (value) => (value === null || value === undefined ? "–" : value.toFixed(3));
  const moment = (time) => new Date(1000 * time).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
  function clock(time) {
    const date = new Date(1000 * time);
    const isToday = Math.abs(Date.now() - date) < 20 * 3600e3;
    return isToday ? date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" }) : moment(time);
  }
  const names = (list) => (list.length > 8 ? `${list.slice(0, 8).join(", ")} and ${list.length - 8} more` : list.join(", "));

  // Spans whose text follows the clock of the coordinator.
  let skew = 0;
  const now = () => Date.now() / 1000 + skew;
  const ago = (time, text = (d) => `${d} ago`) => ticking((t) => text(duration(t - time)), moment(time));
  function ticking(text, title) {
    const node = h("span", { title });
    node.tick = () => { const fresh = text(now()); if (node.textContent !== fresh) node.textContent = fresh; };
    node.tick();
    node.classList.add("tick");
    return node;
  }
  setInterval(() => document.querySelectorAll(".tick").forEach((node) => node.tick()), 1000);

  // ------------------------------------------------------------------------------------------------------ requests
  class Refusal extends Error {
    constructor(status, problem) {
      super([problem.message, problem.remedy].filter(Boolean).join(". ") || `the coordinator answers ${status}`);
      this.status = status;
    }
  }
  class Unreachable extends Error {}
  async function ask(path, { method = "GET", body, limit = 45, abort = new AbortController() } = {}) {
    const timer = setTimeout(() => abort.abort(), 1000 * limit);
    try {
      const answer = await fetch(base + path, {
        method, credentials: "same-origin", cache: "no-store", redirect: "error", signal: abort.signal,
        headers: body ? { "Content-Type": "application/json" } : {}, body: body && JSON.stringify(body) });
      const isJson = (answer.headers.get("content-type") || "").startsWith("application/json");
      const content = isJson ? await answer.json() : {};
      if (!answer.ok) throw new Refusal(answer.status, content);
      return content;
    } catch (error) { // nobody answers, or something in between does
      throw error instanceof Refusal ? error : new Unreachable("The coordinator cannot be reached.", { cause: error });
    } finally {
      clearTimeout(timer);
    }
  }

  // --------------------------------------------------------------------------------------------------------- login
  let viewer = null;
  let enrolment = null;

  function decodeInvitation(word) {
    const text = word.slice("nnunet-fed:".length).replace(/-/g, "+").replace(/_/g, "/");
    const raw = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const content = JSON.parse(new TextDecoder().decode(raw));
    if (typeof content.site !== "string" || typeof content.secret !== "string") throw new Error();
    return content;
  }
  function newToken(name) {
    const raw = crypto.getRandomValues(new Uint8Array(32));
    const text = btoa(String.fromCharCode(...raw)).replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "");
    return `${name}.${text}`;
  }
  function showLogin(message = "") {
    viewer = null;
    document.title = "nnU-Net federation";
    for (const id of ["view", "who", "health", "enrol-form"]) byId(id).hidden = true;
    byId("login").hidden = byId("login-form").hidden = false;
    byId("login-title").textContent = "Log in";
    byId("login-error").textContent = message;
    byId("secret").value = "";
    byId("secret").focus();
  }
  function showEnrolment(word) {
    let invitation;
    try {
      invitation = decodeInvitation(word);
    } catch {
      byId("login-error").textContent = "The invitation is damaged or cut off: copy the whole word again.";
      return;
    }
    enrolment = { invitation: invitation.secret, token: newToken(invitation.site) };
    byId("login").hidden = byId("enrol-form").hidden = false;
    byId("login-form").hidden = true;
    byId("login-title").textContent = "Join as an observer";
    byId("enrol-text").textContent = `${invitation.site}, you are invited to look at ${invitation.federation}.`;
    byId("new-token").value = enrolment.token;
    byId("enrol-error").textContent = "";
    byId("new-token").focus();
    byId("new-token").select();
  }
  async function logIn(body, errorId, button) {
    button.disabled = true;
    byId(errorId).textContent = "";
    try {
      begin(await ask("v1/session", { method: "POST", body }));
    } catch (error) {
      byId(errorId).textContent = error.message[0].toUpperCase() + error.message.slice(1);
    } finally {
      button.disabled = false;
    }
  }
  byId("login-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const secret = byId("secret").value.trim();
    const invitation = secret.match(/nnunet-fed:[A-Za-z0-9_-]+/);
    if (invitation) return showEnrolment(invitation[0]);
    if (!/^[A-Za-z0-9][A-Za-z0-9_-]*\.\S{16,}$/.test(secret)) {
      byId("login-error").textContent = "A token is a name, a dot and many letters: copy the whole word.";
      return undefined;
    }
    return logIn({ token: secret }, "login-error", event.submitter || event.target.querySelector("button"));
  });
  byId("enrol-form").addEventListener("submit", (event) => {
    event.preventDefault();
    logIn(enrolment, "enrol-error", event.target.querySelector("button[type=submit]"));
  });
  byId("copy-token").addEventListener("click", async () => {
    byId("new-token").select();
    try {
      await navigator.clipboard.writeText(byId("new-token").value);
      byId("copy-token").textContent = "Copied";
    } catch {
      byId("copy-token").textContent = "Selected: press Ctrl+C";
    }
  });
  byId("logout").addEventListener("click", async () => {
    generation += 1;
    following.abort(); // else it might be told that nobody is logged in any more
    try {
      await ask("v1/session", { method: "DELETE" });
      showLogin("You have logged out.");
    } catch {
      live("lost", "not logged out: no connection");
      watch(++generation);
    }
  });

  // --------------------------------------------------------------------------------------------------- live updates
  let generation = 0, following = new AbortController();
  function begin(who) {
    viewer = who;
    enrolment = null;
    byId("new-token").value = byId("secret").value = "";
    byId("viewer").textContent = `${who.name}, ${who.role}`;
    byId("login").hidden = true;
    byId("who").hidden = byId("view").hidden = byId("health").hidden = false;
    watch(++generation);
  }
  function live(state, text) {
    byId("live").className = `live ${state}`;
    if (byId("live").textContent !== text) byId("live").textContent = text;
  }
  async function watch(mine) {
    let seen = "", failures = 0, lastGood = null;
    live("", "connecting");
    while (mine === generation && viewer) {
      try {
        following = new AbortController();
        const overview = await ask(`v1/overview?wait=10&seen=${encodeURIComponent(seen)}`, { abort: following });
        if (mine !== generation || !viewer) return;
        skew = overview.time - Date.now() / 1000;
        await draw(overview);
        if (overview.revision !== seen) beat();
        seen = overview.revision;
        failures = 0;
        lastGood = overview.time;
        live(byId("live").classList.contains("beat") ? "beat" : "", "live");
        byId("stale").hidden = true;
        await pause(0.3);
      } catch (error) {
        if (mine !== generation || !viewer) return;
        if (error instanceof Refusal && (error.status === 401 || error.status === 403)) {
          showLogin("Your session has ended.");
          return;
        }
        if (!(error instanceof Refusal || error instanceof Unreachable)) reportError(error); // a mistake of this page
        failures += 1;
        seen = "";
        live("lost", "no connection, trying again");
        if (lastGood && failures > 1) {
          byId("stale").textContent = `No connection to the coordinator: this is how things were at ${clock(lastGood)}.`;
          byId("stale").hidden = false;
        }
        await Promise.race([pause(Math.min(15, 0.5 * 2 ** failures)),
          new Promise((resolve) => addEventListener("online", resolve, { once: true }))]);
      }
    }
  }
  function beat() {
    byId("live").classList.remove("beat");
    void byId("live").offsetWidth; // starts the animation anew
    byId("live").classList.add("beat");
  }

  // ---------------------------------------------------------------------------------------------------- the overview
  const cards = new Map();
  const DOING = {
    working: ["busy", "working"], sending: ["busy", "sending"], waiting: ["good", "has sent, waits"],
    failed: ["bad-badge", "failed"], left: ["", "has left"], idle: ["good", "joined"], invited: ["wait", "invited"],
    revoked: ["", "revoked"] };
  const badge = ([kind, text], title) => h("span", { class: `badge ${kind}`, title }, text);

  async function draw(overview) {
    document.title = `${overview.federation} – nnU-Net federation`;
    byId("federation").textContent = overview.federation;
    byId("subtitle").textContent = rules(overview);
    drawSummary(overview);
    await drawRuns(overview);
    drawMeetings(overview.meetings);
    drawSites(overview.sites);
    drawTroubles(overview.troubles);
    drawHealth(overview.health);
  }
  function rules(overview) {
    const active = overview.sites.filter((site) => site.state !== "revoked").length;
    const floor = [` Nothing is averaged over fewer than ${overview.min_sites}`, ...overview.methods].join(". ") + ".";
    if (overview.quorum && overview.deadline_s) {
      return `${active} sites; after ${duration(overview.deadline_s)}, a round goes on with ${overview.quorum} of them.${floor}`;
    }
    return `${active} sites; rounds wait for all of them.${floor}`;
  }
  function drawSummary(overview) {
    const count = (list, test) => list.filter(test).length;
    const sites = overview.sites.filter((site) => site.state !== "revoked");
    const failed = count(sites, (site) => site.activity === "failed");
    const recent = count(overview.troubles, (one) => one.time > overview.time - 86400);
    const traffic = overview.sites.reduce((sum, site) => sum + site.bytes_received + site.bytes_sent, 0);
    const tile = (value, text, kind = "") =>
      h("div", { class: "tile" }, h("p", { class: `value ${kind}` }, value), h("p", { class: "quiet" }, text));
    const going = count(overview.runs, (run) => run.state === "running" || run.state === "paused");
    byId("summary").replaceChildren(
      tile(`${count(sites, (site) => site.state === "active")} of ${sites.length}`, "sites have joined"),
      tile(`${going} of ${overview.runs.length}`, overview.runs.length === 1 ? "run is going on" : "runs are going on"),
      failed ? tile(`${failed}`, failed === 1 ? "site has failed" : "sites have failed", "bad")
        : tile(`${recent}`, recent === 1 ? "error in the last 24 h" : "errors in the last 24 h", recent ? "bad" : ""),
      tile(bytes(traffic), "sent and received"));
  }
  async function drawRuns(overview) {
    const place = (run) => (run.state === "running" || run.state === "paused" ? 0 : 1); // what goes on comes first
    const runs = [...overview.runs].sort((a, b) => place(a) - place(b));
    const wanted = runs.map((run) => run.run);
    for (const [run, card] of cards) {
      if (!wanted.includes(run)) { card.node.remove(); cards.delete(run); }
    }
    if (!wanted.length) {
      byId("runs").replaceChildren(h("p", { class: "card empty" }, "No site has registered for a training run yet."));
      return;
    }
    for (const run of runs) if (!cards.has(run.run)) cards.set(run.run, new RunCard(run.run));
    const nodes = runs.map((run) => cards.get(run.run).node);
    if (nodes.some((node, i) => byId("runs").children[i] !== node)) byId("runs").replaceChildren(...nodes);
    for (const run of runs) await cards.get(run.run).draw(run);
  }
  function lacking(open) {
    return `all that take part have sent; too few sites, waiting for ${open.lacks} more.`;
  }
  const STAGE = { census: "Comparison of the datasets", coarse: "Statistics of the intensities, first part",
    fine: "Statistics of the intensities, second part", plans: "Comparison of the plans",
    fingerprint_upload: "Masked statistics", fingerprint_survivors: "Masked statistics, who takes part",
    fingerprint_sum: "Masked statistics, opening of the sum", shape_upload: "Masked shapes",
    shape_survivors: "Masked shapes, who takes part", shape_sum: "Masked shapes, opening of the sum",
    late_census: "Comparison of a latecomer's dataset", late_plans: "Comparison of a latecomer's plans" };
  function drawMeetings(meetings) {
    byId("meetings-section").hidden = !meetings.length;
    byId("meetings").replaceChildren(...meetings.map((one) => h("li", {},
      h("p", { class: "what" }, h("strong", {}, STAGE[one.kind] || one.key)),
      one.refusal ? h("p", { class: "error what" }, one.refusal) : h("p", { class: "quiet what" },
        !one.waiting_for.length && one.lacks ? lacking(one) : `Waiting for ${names(one.waiting_for)}`, one.since ? ago(one.since, (d) => ` for ${d}`) : ""))));
  }
  function drawSites(sites) {
    const most = Math.max(1, ...sites.map((site) => Math.max(site.bytes_received, site.bytes_sent)));
    // Roles, because a narrow screen shows the rows as blocks.
    const cell = (label, kind, ...content) => h("td", { class: kind, role: "cell", "data-label": label }, ...content);
    const amount = (label, count) => {
      const part = h("span");
      part.style.width = `${(100 * count) / most}%`;
      return cell(label, "number", bytes(count), h("div", { class: "share", "aria-hidden": "true" }, part));
    };
    byId("sites").replaceChildren(...sites.map((site) => h("tr", { role: "row" },
      h("th", { scope: "row", role: "rowheader" }, h("span", { class: "name" }, site.site), badge(DOING[site.activity], site.run),
        site.expires && site.state !== "revoked" ? h("p", { class: "quiet" }, `invitation good until ${moment(site.expires)}`) : null),
      cell("last seen", "quiet", site.last_seen ? ago(site.last_seen) : "never"),
      amount("received", site.bytes_received), amount("sent", site.bytes_sent))));
  }
  const TROUBLE = { failure: ["bad-badge", "failure"], refusal: ["wait", "refused"], late: ["wait", "late"] };
  function drawTroubles(troubles) {
    const shown = troubles.slice(0, 12).map((one) => h("li", {},
      h("p", {}, badge(TROUBLE[one.kind]), " ", h("strong", {}, one.site || ""), " ",
        h("span", { class: "quiet" }, ago(one.time))),
      h("p", { class: "what" }, one.text), h("p", { class: "quiet what" }, one.key)));
    byId("troubles").replaceChildren(...(shown.length ? shown : [h("li", { class: "empty" }, "None.")]));
  }
  function drawHealth(health) {
    byId("health").replaceChildren(
      h("p", {}, "Coordinator started ", ago(health.started), `, ${bytes(health.disk_free)} of disk free, `,
        health.uploads === 1 ? "1 upload in progress." : `${health.uploads} uploads in progress.`),
      h("p", {}, `Audit log: ${health.log_lines} lines; its head, worth noting elsewhere: `, h("code", {}, health.log_head)));
  }

  // ------------------------------------------------------------------------------------------------------------ a run
  const RUN_STATE = { running: ["busy", "running"], paused: ["wait", "paused"], stopped: ["", "stopped"],
    complete: ["good", "complete"] };
  const METRICS = [["train_losses", "Training loss"], ["val_losses", "Validation loss"],
    ["mean_fg_dice", "Dice before averaging"]];
  const NAMES = Object.fromEntries(METRICS);

  class RunCard {
    constructor(run) {
      this.run = run;
      this.rounds = [];
      this.validations = [];
      this.classes = null;
      this.charts = new Map();
      this.chosen = null;
      const [, configuration, fold, trainer] = run.match(/^(.*)\.fold_([^.]+)\.(.*)$/) || [run, run, "", ""];
      this.state = h("span");
      this.bar = h("div", { class: "bar", role: "progressbar", "aria-valuemin": 0, "aria-label": "closed rounds" }, h("span"));
      this.facts = h("dl", { class: "facts" });
      this.waiting = h("p", { class: "waiting" });
      this.members = h("ul", { class: "members", "aria-label": "What the sites are doing" });
      this.outliers = h("p", { class: "waiting wrong", hidden: true });
      this.model = h("p", { class: "model quiet" });
      this.networks = h("ul", { class: "model quiet", "aria-label": "Networks of the sites" });
      this.privacy = h("p", { class: "model quiet" });
      this.legend = h("div", { class: "legend", hidden: true, role: "group", "aria-label": "Show one line only" });
      this.grid = h("div", { class: "charts" });
      this.numbers = h("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": "Last rounds in numbers" });
      this.table = h("details", { hidden: true }, h("summary", {}, "The last rounds in numbers"), this.numbers);
      this.classNumbers = h("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": "Dice by class" });
      this.classTitle = h("summary");
      this.classTable = h("details", { hidden: true }, this.classTitle, this.classNumbers);
      this.node = h("article", { class: "card", "aria-label": `Run ${run}` },
        h("div", { class: "run-head" }, h("div", {},
          h("h3", {}, fold ? `${configuration}, fold ${fold}` : configuration),
          h("p", { class: "quiet" }, trainer)), this.state),
        this.bar, this.facts, this.waiting, this.members, this.outliers, this.model, this.networks, this.privacy, this.legend, this.grid, this.table, this.classTable);
    }

    async draw(run) {
      this.state.replaceWith((this.state = badge(RUN_STATE[run.state])));
      this.drawProgress(run);
      this.drawWaiting(run);
      this.members.hidden = !run.members.length;
      this.members.replaceChildren(...run.members.map((one) => h("li", {}, h("strong", {}, one.site),
        badge(DOING[one.activity]), one.since && one.activity !== "left" ? h("span", { class: "quiet" }, ago(one.since, (d) => d)) : null,
        one.note ? h("span", { class: one.activity === "failed" ? "note" : "quiet" }, one.note) : null)));
      this.model.hidden = !run.model;
      this.model.textContent = run.model && run.model[0].toUpperCase() + run.model.slice(1);
      this.networks.hidden = !run.networks.length;
      this.networks.replaceChildren(...run.networks.map((line) => h("li", {}, line)));
      this.privacy.hidden = !run.privacy;
      this.privacy.textContent = run.privacy && run.privacy[0].toUpperCase() + run.privacy.slice(1);
      if (await this.fetch(run)) this.drawCurves();
    }

    drawProgress(run) {
      const total = run.num_rounds;
      this.bar.hidden = !total;
      this.bar.setAttribute("aria-valuemax", total || 0);
      this.bar.setAttribute("aria-valuenow", run.rounds_closed);
      this.bar.firstChild.style.width = `${total ? (100 * run.rounds_closed) / total : 0}%`;
      const facts = [["Closed rounds", total ? `${run.rounds_closed} of ${total}` : `${run.rounds_closed}`,
        run.last_closed ? ago(run.last_closed, (d) => `the last one ${d} ago`) : null]];
      if (run.round_s !== null) facts.push(["A round takes", run.round_s < 10 ? `${run.round_s.toFixed(1)}\u00a0s` : duration(run.round_s), "median of the last ten"]);
      if (run.left_s !== null) facts.push(["Time left", run.left_s < 60 ? "less than a minute" : `about ${duration(run.left_s)}`, `until ${clock(now() + run.left_s)}`]);
      if (run.mean_dice !== null) {
        facts.push([`Dice of aggregate ${run.validated_round}`, dice(run.mean_dice),
          run.best_round === null ? null : `best so far: round ${run.best_round}`]);
      }
      if (run.last_missing.length && run.state !== "complete") {
        facts.push(["The last round went on without", names(run.last_missing), null]);
      }
      this.facts.replaceChildren(...facts.map(([term, value, small]) =>
        h("div", {}, h("dt", {}, term), h("dd", {}, value, small ? h("small", {}, small) : null))));
    }

    drawWaiting(run) {
      const open = run.meeting;
      this.waiting.hidden = !open;
      if (!open) return;
      const round = `Round ${open.key.split("/").pop()}`;
      const what = { registration: "Registration", initial: "Common initial weights", upload: `${round}, masked updates`,
        survivors: `${round}, confirmations` }[open.kind] || round;
      const parts = [h("strong", {}, `${what}: `)];
      if (open.refusal) parts.push(open.refusal);
      else if (run.state === "paused") parts.push("paused by the operator; the sites' work is taken and kept.");
      else if (!open.waiting_for.length && open.lacks) parts.push(lacking(open));
      else if (!open.waiting_for.length) parts.push("everybody has sent; the result is being computed.");
      else {
        parts.push(`waiting for ${names(open.waiting_for)}`);
        if (open.since) parts.push(` since ${clock(open.since)}`, ago(open.since, (d) => ` (${d})`));
        if (open.due) parts.push(ticking((t) => (open.due > t ? `; goes on without in ${duration(open.due - t)}` : "; goes on now")));
        parts.push(".");
      }
      this.waiting.className = `waiting ${open.refusal ? "wrong" : ""}`;
      this.waiting.replaceChildren(...parts);
    }

    // Fetch what is new, and say whether anything is.
    async fetch(run) {
      const known = this.rounds.length ? this.rounds[this.rounds.length - 1].round : -1;
      if (run.rounds_closed <= known) { this.rounds = []; this.validations = []; } // the run was reset
      let isNew = false, more = true;
      while (more) {
        const next = (list) => (list.length ? list[list.length - 1].round + 1 : 0);
        const [since, validation] = [next(this.rounds), next(this.validations)];
        const isBehind = since < run.rounds_closed || (run.validated_round !== null && validation <= run.validated_round);
        if (!isBehind && !(isNew && more)) return isNew;
        // The last known round comes once more: what its sites measured after their updates had left came with the next.
        const from = Math.max(0, since - 1);
        const found = await ask(`v1/runs/${encodeURIComponent(this.run)}/curves?since=${from}&since_validation=${validation}`);
        this.rounds = [...this.rounds.filter((one) => one.round < from), ...found.rounds];
        this.validations.push(...found.validations);
        this.classes = found.classes || this.classes;
        [isNew, more] = [true, found.more];
      }
      return isNew;
    }

    drawCurves() {
      const last = this.rounds[this.rounds.length - 1];
      this.outliers.hidden = !last || !(last.outliers.length || last.conspicuous);
      if (last) this.outliers.textContent = `Round ${last.round}: what ${last.outliers.length ? names(last.outliers)
        : `${last.conspicuous} of the sites`} sent moves the network conspicuously far; it was counted.`;
      const hasMetrics = (one) => Object.keys(one.sites).filter((site) => Object.keys(one.sites[site].metrics).length);
      const sites = [...new Set([...this.rounds.flatMap(hasMetrics),
        ...this.validations.flatMap((one) => Object.keys(one.dice_of_site))])].sort();
      this.drawLegend(sites, this.validations.length > 0);
      const kind = (site) => `s${sites.indexOf(site) % 8} d${Math.floor(sites.indexOf(site) / 8) % 4}`;
      const known = METRICS.map(([name]) => name);
      const others = [...new Set(this.rounds.flatMap((one) => Object.keys(one.pooled)))].filter((name) => !known.includes(name));
      for (const name of [...known, ...others.sort().slice(0, 4)]) {
        const lines = [
          ...sites.map((site) => ({ name: site, kind: kind(site), points: this.rounds.filter((one) => one.sites[site])
            .map((one) => [one.round, one.sites[site].metrics[name]]) })),
          { name: "all sites", kind: "pooled", points: this.rounds.map((one) => [one.round, one.pooled[name]]) }];
        this.drawChart(name, NAMES[name] || name.replace(/_/g, " "), lines, name === "mean_fg_dice");
      }
      this.drawChart("aggregate", "Dice of the aggregate", [
        ...sites.map((site) => ({ name: site, kind: kind(site),
          points: this.validations.map((one) => [one.round, one.dice_of_site[site]]) })),
        { name: "moving average", kind: "average", points: this.validations.map((one) => [one.round, one.ema_dice]) },
        { name: "all sites", kind: "pooled", points: this.validations.map((one) => [one.round, one.mean_dice]) }], true);
      this.drawNumbers();
      this.drawClasses();
    }

    drawChart(name, title, lines, isDice) {
      const drawn = lines.map((line) => ({ ...line, points: line.points.filter(([, y]) => Number.isFinite(y)) }))
        .filter((line) => line.points.length);
      if (!drawn.length) return;
      if (!this.charts.has(name)) {
        this.charts.set(name, new Chart(title, isDice));
        const order = ["train_losses", "val_losses", "aggregate", "mean_fg_dice"];
        const place = (key) => (order.includes(key) ? order.indexOf(key) : 9);
        this.grid.replaceChildren(...[...this.charts].sort(([a], [b]) => place(a) - place(b)).map(([, chart]) => chart.node));
      }
      this.charts.get(name).draw(drawn, this.chosen);
    }

    drawLegend(sites, hasAverage) {
      const wanted = [...sites, hasAverage].join("\n");
      if (this.legend.dataset.shown === wanted) return;
      this.legend.dataset.shown = wanted;
      this.legend.hidden = false;
      this.legend.replaceChildren(...[...sites.map((site, i) => [site, `s${i % 8} d${Math.floor(i / 8) % 4}`]),
        ["all sites", "pooled"], ...(hasAverage ? [["moving average", "average"]] : [])].map(([name, kind]) => {
        const button = h("button", { type: "button", "aria-pressed": "false" }, sample(kind), name);
        button.addEventListener("click", () => {
          this.chosen = this.chosen === name ? null : name;
          this.legend.querySelectorAll("button").forEach((one) => one.setAttribute("aria-pressed", one === button && !!this.chosen));
          this.charts.forEach((chart) => chart.choose(this.chosen));
        });
        return button;
      }));
    }

    drawNumbers() {
      const metrics = METRICS.filter(([name]) => this.rounds.some((one) => name in one.pooled));
      const mean = new Map(this.validations.map((one) => [one.round, one.mean_dice]));
      const rows = this.rounds.slice(-12).reverse();
      this.table.hidden = !rows.length;
      const cell = (text) => h("td", { class: "number" }, text);
      this.numbers.replaceChildren(h("table", {},
        h("thead", {}, h("tr", {}, ...["Round", "Closed", "Sites", "Without", ...metrics.map(([, title]) => title), "Dice of the aggregate"]
          .map((title, i) => h("th", { scope: "col", class: i > 3 ? "number" : "" }, title)))),
        h("tbody", {}, ...rows.map((one) => h("tr", {}, h("th", { scope: "row" }, `${one.round}`), h("td", {}, clock(one.closed)),
          h("td", {}, `${Object.keys(one.sites).length}`), h("td", {}, names(one.missing) || "–"),
          ...metrics.map(([name]) => cell(name in one.pooled ? decimals(one.pooled[name], 4) : "–")),
          cell(dice(mean.get(one.round))))))));
    }

    drawClasses() {
      const found = this.classes;
      this.classTable.hidden = !found;
      if (!found) return;
      const sites = Object.keys(found.sites).sort();
      this.classTitle.textContent = `Dice by class, aggregate of round ${found.round}`;
      this.classNumbers.replaceChildren(h("table", {},
        h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Class"), ...["all sites", ...sites].map((name) =>
          h("th", { scope: "col", class: "number" }, name)))),
        h("tbody", {}, ...found.names.map((name, i) => h("tr", {}, h("th", { scope: "row" }, name),
          ...[found.pooled, ...sites.map((site) => found.sites[site])].map((list) =>
            h("td", { class: "number" }, dice(list[i]))))))));
    }
  }
  const sample = (kind) => s("svg", { viewBox: "0 0 26 10", "aria-hidden": "true", focusable: "false" },
    s("path", { d: "M1 5H25", class: `line ${kind}` }));

  // ---------------------------------------------------------------------------------------------------------- a chart
  const HEIGHT = 200, LEFT = 46, RIGHT = 10, TOP = 10, BOTTOM = 24;

  function ticks(low, high, count) {
    const step0 = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(step0));
    const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= step0 * 0.999);
    const first = Math.floor(low / step + 1e-9), last = Math.ceil(high / step - 1e-9);
    return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
  }
  // At most one point per pixel: of what falls together, the lowest and the highest.
  function thin(points, limit) {
    if (points.length <= limit) return points;
    const size = Math.ceil((2 * points.length) / limit), kept = [];
    for (let i = 0; i < points.length; i += size) {
      const part = points.slice(i, i + size).sort((a, b) => a[1] - b[1]);
      kept.push(...[part[0], part[part.length - 1]].sort((a, b) => a[0] - b[0]));
    }
    return kept;
  }

  class Chart {
    constructor(title, isDice) {
      this.title = title;
      this.isDice = isDice;
      this.lines = [];
      this.at = null;
      this.last = h("span", { class: "last" });
      this.svg = s("svg", { role: "img", tabindex: "0" });
      this.tip = h("div", { class: "tip", hidden: true });
      this.node = h("figure", { class: "chart" }, h("h4", {}, `${title} `, this.last), this.svg, this.tip);
      this.svg.addEventListener("pointermove", (event) => this.point(this.roundAt(event)));
      this.svg.addEventListener("pointerdown", (event) => this.point(this.roundAt(event)));
      this.svg.addEventListener("pointerleave", () => this.point(null));
      this.svg.addEventListener("blur", () => this.point(null));
      this.svg.addEventListener("keydown", (event) => this.key(event));
      new ResizeObserver(() => { if (this.lines.length && this.node.clientWidth !== this.width) this.paint(); }).observe(this.node);
    }

    draw(lines, chosen) {
      this.lines = lines;
      this.chosen = chosen;
      const pooled = lines[lines.length - 1], [round, value] = pooled.points[pooled.points.length - 1];
      this.last.textContent = `${pooled.name} ${decimals(value, 3)} in round ${round}`;
      this.svg.setAttribute("aria-label", `${this.title} by round. ` + lines.map((line) =>
        `${line.name}: ${line.points[line.points.length - 1][1].toFixed(3)}`).join(", ") + ". Arrow keys read the rounds.");
      this.rounds = [...new Set(lines.flatMap((line) => line.points.map(([x]) => x)))].sort((a, b) => a - b);
      this.paint();
    }

    choose(name) { this.chosen = name; this.paint(); }

    paint() {
      this.width = Math.max(200, this.node.clientWidth);
      this.svg.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
      const values = this.lines.flatMap((line) => line.points.map(([, y]) => y));
      const low = this.isDice ? 0 : Math.min(...range(values)), high = this.isDice ? 1 : Math.max(...range(values));
      const yTicks = low === high ? ticks(low - 0.5, high + 0.5, 4) : ticks(low, high, 4);
      const [bottom, top] = [yTicks[0], yTicks[yTicks.length - 1]];
      const [first, last] = [this.rounds[0], Math.max(this.rounds[this.rounds.length - 1], this.rounds[0] + 1)];
      this.x = (round) => LEFT + ((round - first) / (last - first)) * (this.width - LEFT - RIGHT);
      const inside = (value) => Math.min(top, Math.max(bottom, value));
      this.y = (value) => TOP + ((top - inside(value)) / (top - bottom)) * (HEIGHT - TOP - BOTTOM);
      const digits = Math.max(0, ...yTicks.map((one) => (`${one}`.split(".")[1] || "").length));
      const grid = yTicks.flatMap((one) => [
        s("line", { class: "grid", x1: LEFT, x2: this.width - RIGHT, y1: this.y(one), y2: this.y(one) }),
        s("text", { x: LEFT - 8, y: this.y(one) + 4, "text-anchor": "end" }, decimals(one, Math.min(4, digits)))]);
      const xTicks = ticks(first, last, Math.max(2, Math.floor(this.width / 110)))
        .filter((one) => one >= first && one <= last && Number.isInteger(one));
      const labels = xTicks.map((one, i) => s("text", { x: this.x(one), y: HEIGHT - 6,
        "text-anchor": one === last && i ? "end" : "middle" }, i ? `${one}` : `round ${one}`));
      if (labels.length && xTicks[0] === first) { labels[0].setAttribute("x", LEFT); labels[0].setAttribute("text-anchor", "start"); }
      this.marks = s("g");
      const onTop = [...this.lines].sort((a, b) => (a.name === this.chosen) - (b.name === this.chosen));
      this.svg.classList.toggle("many", this.lines.length > 10);
      this.svg.replaceChildren(...grid, ...labels, ...onTop.map((line) => this.path(line)), this.marks);
      if (this.at !== null) this.point(this.at);
    }

    path(line) {
      const points = thin(line.points, this.width);
      const group = s("g", { class: this.chosen && this.chosen !== line.name ? "dim" : "" });
      group.append(s("path", { class: `line ${line.kind}`,
        d: points.map(([x, y], i) => `${i ? "L" : "M"}${this.x(x).toFixed(1)} ${this.y(y).toFixed(1)}`).join("") }));
      if (points.length === 1) group.append(this.dot(line, points[0]));
      return group;
    }

    dot(line, [x, y]) { return s("circle", { class: `dot ${line.kind}`, cx: this.x(x), cy: this.y(y), r: 3.6 }); }

    roundAt(event) {
      const place = event.clientX - this.svg.getBoundingClientRect().left;
      return this.rounds.reduce((best, one) => (Math.abs(this.x(one) - place) < Math.abs(this.x(best) - place) ? one : best));
    }

    key(event) {
      const i = this.at === null ? this.rounds.length - 1 : this.rounds.indexOf(this.at);
      const next = { ArrowLeft: i - (this.at === null ? 0 : 1), ArrowRight: i + 1, Home: 0, End: this.rounds.length - 1 }[event.key];
      if (event.key === "Escape") this.point(null);
      if (next === undefined) return;
      event.preventDefault();
      this.point(this.rounds[Math.min(this.rounds.length - 1, Math.max(0, next))]);
    }

    // Show the values of a round; null: none.
    point(round) {
      this.at = round;
      this.tip.hidden = round === null;
      if (round === null) { this.marks.replaceChildren(); return; }
      const found = this.lines.map((line) => [line, line.points.find(([x]) => x === round)]).filter(([, point]) => point);
      const x = this.x(round);
      this.marks.replaceChildren(s("line", { class: "cursor", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }),
        ...found.map(([line, point]) => this.dot(line, point)));
      const shown = [...found].sort(([, a], [, b]) => b[1] - a[1]).slice(0, 12);
      this.tip.replaceChildren(h("strong", {}, `Round ${round}`), h("table", {}, ...shown.map(([line, point]) =>
        h("tr", {}, h("td", {}, sample(line.kind)), h("td", {}, line.name), h("td", { class: "number" }, decimals(point[1], 4))))));
      const space = this.width - this.tip.offsetWidth;
      this.tip.style.left = `${Math.max(0, Math.min(space, x < this.width / 2 ? x + 12 : x - this.tip.offsetWidth - 12))}px`;
    }
  }
  // The first epochs may be far off: they do not set the scale once there are many others.
  function range(values) {
    if (values.length < 60) return [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
    const sorted = [...values].sort((a, b) => a - b);
    return [sorted[0], sorted[Math.floor(0.995 * (sorted.length - 1))]];
  }

  // ----------------------------------------------------------------------------------------------------------- start
  async function start() {
    const word = decodeURIComponent(location.hash.slice(1));
    if (word) history.replaceState(null, "", location.pathname); // the secret does not stay in the address
    try {
      const who = await ask("v1/session");
      if (who.name) return begin(who);
      showLogin();
    } catch (error) {
      const isOver = error instanceof Refusal && error.status === 401;
      showLogin(isOver ? "" : "The coordinator cannot be reached at the moment.");
    }
    if (word.startsWith("nnunet-fed:")) showEnrolment(word);
    return undefined;
  }
  addEventListener("hashchange", () => { if (!viewer && location.hash.length > 1) start(); });
  start();
})();
