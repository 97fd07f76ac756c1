(() => {
  "use strict";
  const $ = (id) => document.getElementById("t-" + id);
  const { texts, updates } = JSON.parse($("data").textContent);
  // Viridis, its dark end lifted so that text stays readable on it.
  const RAMP = [[112, 90, 190], [72, 116, 200], [42, 146, 190], [40, 170, 150], [110, 195, 100], [190, 215, 60], [250, 220, 50]];
  const colour = (x) => {
    const at = Math.min(Math.max(x, 0), 1) * (RAMP.length - 1), i = Math.min(Math.floor(at), RAMP.length - 2), f = at - i;
    const [r, g, b] = RAMP[i].map((v, k) => Math.round(v + (RAMP[i + 1][k] - v) * f));
    return `rgb(${r} ${g} ${b} / .42)`;
  };
  let sample, tokens = [], blocks = [], last = 0, step = 0, mode = "block", timer = 0;

  const fill = (select, labels) => {
    select.replaceChildren(...labels.map((label, i) => new Option(label, i)));
    select.selectedIndex = 0;
  };
  const short = (text, n) => { const one = text.replace(/\s+/g, " ").trim(); return one.length > n ? one.slice(0, n - 1) + "…" : one; };
  const shown = (text) => text.replace(/\n/g, "⏎\n").replace(/\t/g, "⇥") || "·";

  function chooseUpdate() {
    const { problems } = updates[$("update").selectedIndex];
    fill($("problem"), problems.map((p) => `${p.right}/${p.of} right · ${short(p.question, 90)}`));
    chooseProblem();
  }
  function chooseProblem() {
    const problem = updates[$("update").selectedIndex].problems[$("problem").selectedIndex];
    fill($("sample"), problem.samples.map((s, i) => `${i + 1}: ${s.verdict}`));
    chooseSample();
  }
  function chooseSample() {
    pause();
    const problem = updates[$("update").selectedIndex].problems[$("problem").selectedIndex];
    sample = problem.samples[$("sample").selectedIndex];
    last = Math.max(...sample.steps);
    $("slider").max = last;
    $("prompt").textContent = sample.prompt;
    $("verdict").textContent = sample.verdict;
    $("verdict").className = "verdict " + (sample.verdict === "correct" ? "up" : "down");
    $("info").textContent = `expected ${problem.answer} · B=${sample.B} · ${sample.length} tokens in ${last} steps, ${(sample.length / last).toFixed(2)} a step` + (sample.how && ` · decoded ${sample.how}`) + (sample.stop === "length" ? " · cut at the cap" : "");
    build();
    go(last);
  }
  function build() {
    tokens = []; blocks = [];
    const boxes = [];
    for (let i = -sample.offset; i < sample.tokens.length; i++) {
      const place = i + sample.offset;
      if (place % sample.B === 0) {
        const box = document.createElement("div");
        box.className = "block";
        blocks.push({ box, first: Infinity, last: 0 });
        boxes.push(box);
      }
      const token = document.createElement("span"), block = blocks[blocks.length - 1];
      token.className = "tok";
      if (i < 0) {
        token.classList.add("given"); token.textContent = "▪"; token.title = "prompt";
      } else {
        token.textContent = shown(texts[sample.tokens[i]]);
        const bar = document.createElement("span");
        bar.className = "bar"; bar.style.width = 100 * sample.p[i] + "%";
        token.append(bar);
        block.first = Math.min(block.first, sample.steps[i]);
        block.last = Math.max(block.last, sample.steps[i]);
        if (i >= sample.length) token.classList.add("after");
        tokens.push({ token, block, step: sample.steps[i], p: sample.p[i] });
      }
      block.box.append(token);
    }
    blocks.forEach((b, i) => { b.box.dataset.label = `${i + 1} · ${b.last - b.first + 1} step${b.last > b.first ? "s" : ""}`; });
    for (const t of tokens) {
      t.token.title = `step ${t.step} (${t.step - t.block.first + 1} of its block), probability ${t.p.toFixed(3)}` + (t.token.classList.contains("after") ? ", after the stop" : "");
    }
    $("answer").replaceChildren(...boxes);
    paint();
  }
  function paint() {
    const value = {
      block: (t) => (t.step - t.block.first) / Math.max(1, t.block.last - t.block.first),
      all: (t) => (t.step - 1) / Math.max(1, last - 1),
      p: (t) => t.p,
    }[mode];
    for (const t of tokens) t.token.style.background = colour(value(t));
    $("ramp").style.background = `linear-gradient(90deg, ${RAMP.map((_, i) => colour(i / (RAMP.length - 1))).join(",")})`;
    [$("low").textContent, $("high").textContent] = mode === "p" ? ["0", "1"] : mode === "all" ? ["first step", "last step"] : ["first of its block", "last"];
  }
  function go(to) {
    step = Math.min(Math.max(to, 0), last);
    for (const t of tokens) {
      t.token.classList.toggle("off", t.step > step);
      t.token.classList.toggle("new", t.step === step && step < last);
    }
    for (const b of blocks) {
      b.box.classList.toggle("now", step >= b.first && step < b.last);
      b.box.classList.toggle("done", step >= b.last);
    }
    $("slider").value = step;
    const there = tokens.filter((t) => t.step <= step).length;
    $("step").textContent = `step ${step} of ${last} · ${there}/${tokens.length}`;
    $("first").disabled = $("back").disabled = step === 0;
    $("last").disabled = $("next").disabled = step === last;
  }
  function pause() { clearInterval(timer); timer = 0; $("play").textContent = "Play"; $("play").setAttribute("aria-label", "Play"); }
  function play() {
    if (timer) return pause();
    if (step === last) go(0);
    $("play").textContent = "Pause"; $("play").setAttribute("aria-label", "Pause");
    timer = setInterval(() => { go(step + 1); if (step === last) pause(); }, Math.max(60, Math.min(450, 9000 / last)));
  }
  function stepTo(to) { pause(); go(to); }
  function changeUpdate(by) {
    const select = $("update"), to = select.selectedIndex + by;
    if (to >= 0 && to < select.options.length) { select.selectedIndex = to; chooseUpdate(); }
  }

  $("update").onchange = chooseUpdate; $("problem").onchange = chooseProblem; $("sample").onchange = chooseSample;
  $("first").onclick = () => stepTo(0); $("back").onclick = () => stepTo(step - 1); $("play").onclick = play;
  $("next").onclick = () => stepTo(step + 1); $("last").onclick = () => stepTo(last);
  $("slider").oninput = (event) => stepTo(+event.target.value);
  const segments = [...document.querySelectorAll("[data-colour]")];
  for (const button of segments) button.onclick = () => {
    mode = button.dataset.colour;
    for (const other of segments) other.setAttribute("aria-pressed", other === button);
    paint();
  };
  const keys = { ArrowLeft: () => stepTo(step - 1), ArrowRight: () => stepTo(step + 1), Home: () => stepTo(0), End: () => stepTo(last), " ": play, "[": () => changeUpdate(-1), "]": () => changeUpdate(1) };
  addEventListener("keydown", (event) => {
    const box = document.getElementById("traces").getBoundingClientRect();
    const visible = box.top < innerHeight && box.bottom > 0;
    if (!visible || event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
    if (event.target.closest("select, input, button, summary, pre")) return;
    event.preventDefault();
    keys[event.key]();
  });
  fill($("update"), updates.map((u) => `${u.update} · ${u.stage}`));
  $("update").selectedIndex = updates.length - 1;
  chooseUpdate();
})();
