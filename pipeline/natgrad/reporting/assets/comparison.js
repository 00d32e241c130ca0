"use strict"
/* The page of a comparison: curves of all runs, parallel coordinates, and a heat map of tensors. Texts are never read
as HTML or TeX. */

const COLOURS = ["#0a84c9", "#d55e00", "#0e9f6e", "#b8579b", "#c98a00", "#6f6fd8", "#8a5a44", "#4f9da6"]
const RIGHT_ANGLE = Math.PI / 2
const find = (id) => document.getElementById(id)

function style(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim()
}

function element(tag, properties = {}, ...children) {
  const found = Object.assign(document.createElement(tag), properties)
  found.append(...children)
  return found
}

function text(value) {
  return typeof value === "number" ? String(Number(value.toPrecision(4))).replace("-", "−") : String(value ?? "–")
}

/* Long names keep their end, which tells tensors apart. */
function short(name, length) {
  return name.length > length ? `…${name.slice(1 - length)}` : name
}

function themed(figure) {
  const [ink, page, line] = ["--ink", "--page", "--line"].map(style)
  Object.assign(figure, {background_fill_color: page, border_fill_color: page, outline_line_color: line})
  for (const axis of [...figure.xaxis, ...figure.yaxis]) {
    Object.assign(axis, {
      axis_label_text_color: ink, major_label_text_color: ink, axis_line_color: line, major_tick_line_color: line,
      minor_tick_line_color: null, axis_label_text_font_style: "normal", axis_label_text_font_size: "12px",
      major_label_text_font_size: "12px",
    })
  }
  for (const grid of [...figure.xgrid, ...figure.ygrid]) grid.grid_line_color = line
}

function newFigure(options) {
  const figure = Bokeh.Plotting.figure({
    height: 280, sizing_mode: "stretch_width", tools: "box_zoom,pan,reset,save", active_drag: "box_zoom",
    toolbar_location: "above", ...options,
  })
  figure.toolbar.logo = null
  return figure
}

// Colours of runs ----------------------------------------------------------------------------------------------

/* Positions of values between 0 and 1: text in alphabetical order, and numbers in a linear or logarithmic scale. */
function positions({values, log}) {
  const known = values.filter((value) => value !== null)
  if (known.every((value) => typeof value === "number")) {
    const scale = (value) => (log ? Math.log(value) : value)
    const low = scale(Math.min(...known)), high = scale(Math.max(...known))
    return values.map((value) => (value === null ? null : high > low ? (scale(value) - low) / (high - low) : 0.5))
  }
  const names = [...new Set(known.map(text))].sort()
  return values.map((value) => (value === null ? null : names.length > 1 ? names.indexOf(text(value)) / (names.length - 1) : 0.5))
}

/* BokehJS stores colours as numbers with an opacity. */
function hexadecimal(colours) {
  return Array.from(colours, (colour) => (typeof colour === "number" ? `#${(colour >>> 8).toString(16).padStart(6, "0")}` : colour))
}

/* Colours of the light end of the palette have too little contrast with a white page, and dark ones with a dark page. */
function palette() {
  const all = hexadecimal(Bokeh.Palettes.Viridis256)
  return document.documentElement.matches('[data-dark="yes"]') ? all.slice(60) : all.slice(0, 216)
}

function isText(axis) {
  return axis.values.some((value) => typeof value === "string" || typeof value === "boolean")
}

function coloursOf(axis, count) {
  if (!axis) return Array.from({length: count}, (_, run) => COLOURS[run % COLOURS.length])
  if (isText(axis)) {
    const names = [...new Set(axis.values.map(text))].sort()
    return axis.values.map((value) => COLOURS[names.indexOf(text(value)) % COLOURS.length])
  }
  const colours = palette()
  return positions(axis).map((at) => (at === null ? "#8a8a8a" : colours[Math.round(at * (colours.length - 1))]))
}

// Figures ------------------------------------------------------------------------------------------------------

class Page {
  constructor(data) {
    this.data = data
    this.boxes = [...document.querySelectorAll("#overview input")]
    this.rows = this.boxes.map((box) => box.closest("tr"))
    this.lines = this.boxes.map(() => [])
    this.figures = []
    this.colours = []
    this.labels = []
  }

  async start() {
    const {data} = this
    const choices = [["", "run"], ...data.axes.map((axis, index) => [String(index), axis.name])]
    find("colour").replaceChildren(...choices.map(([value, label]) => element("option", {value, textContent: label})))
    // With more runs than colours, the colour shows a value instead of a name.
    if (this.boxes.length > COLOURS.length && data.axes.length) find("colour").value = "0"
    this.theme()
    this.chooseColours()
    for (const curve of data.curves) await this.show(this.curve(curve), find("charts").appendChild(element("div", {className: "plot"})))
    await this.startParallel()
    await this.startHeat()
    this.listen()
    document.documentElement.dataset.ready = "true"
  }

  async show(figure, place) {
    themed(figure)
    this.figures.push(figure)
    await Bokeh.Plotting.show(figure, place)
    return figure
  }

  curve(curve) {
    const {data} = this, names = this.boxes.map((_, run) => data.runs[run])
    const known = curve.values.flat().filter((value) => value !== null)
    const figure = newFigure({x_axis_type: data.log ? "log" : "linear", y_axis_type: curve.log ? "log" : "linear"})
    if (curve.angle) {
      // Angles at the level of rounding are zero; the axis must not magnify them.
      if (Math.max(...known) < 1e-6) figure.y_range = new Bokeh.Range1d({start: 0, end: 0.01})
      if (Math.max(...known) > 1.2) figure.add_layout(new Bokeh.Span({location: RIGHT_ANGLE, dimension: "width", line_color: "#c8374a", line_dash: "dashed", line_width: 1.5}))
    }
    figure.yaxis.axis_label = new Bokeh.PlainText({text: curve.title})
    figure.xaxis.axis_label = new Bokeh.PlainText({text: data.axis})
    if (data.reversed) figure.x_range.flipped = true
    curve.values.forEach((values, run) => {
      const y = values.map((value) => (value === null || (curve.log && value <= 0) ? NaN : value))
      const step = data.steps[run].map((each) => each ?? NaN)
      const source = new Bokeh.ColumnDataSource({data: {x: data.positions, y, step, run: values.map(() => names[run])}})
      const line = figure.line({field: "x"}, {field: "y"}, {
        source, line_color: this.colours[run], line_width: 1.75, line_alpha: 0.9, muted_alpha: 0.1, muted_color: this.colours[run],
      })
      this.lines[run].push(line)
      const steps = data.axis === "step" ? [] : [[data.axis, "@x{0.[000000]}"]]
      figure.add_tools(new Bokeh.HoverTool({
        renderers: [line], mode: "mouse", visible: false,
        tooltips: [["run", "@run"], ["step", "@step{0}"], ...steps, [curve.title, "@y{0.[000000]}"]],
      }))
    })
    return figure
  }

  // Parallel coordinates

  async startParallel() {
    const {axes} = this.data
    if (!axes.some((axis) => axis.configuration) || this.boxes.length < 3) return
    find("parallel").hidden = false
    this.chosen = new Set(axes.flatMap((axis, index) => (axis.drawn ? [index] : [])))
    find("axes").append(...axes.map((axis, index) => {
      const box = element("input", {type: "checkbox", checked: this.chosen.has(index)})
      box.addEventListener("change", () => {
        if (box.checked) this.chosen.add(index)
        else this.chosen.delete(index)
        this.drawParallel()
      })
      return element("label", {className: "box"}, box, axis.name)
    }))
    await this.drawParallel()
  }

  async drawParallel() {
    const place = find("parallel-chart"), old = this.parallel
    if (old) {
      this.figures = this.figures.filter((figure) => figure !== old)
      this.parallelLines.forEach((own, run) => { this.lines[run] = this.lines[run].filter((line) => !own.includes(line)) })
    }
    const figure = this.parallel = this.parallelFigure([...this.chosen].sort((one, other) => one - other).map((index) => this.data.axes[index]))
    place.replaceChildren()
    place.style.minWidth = `${this.chosen.size * 84}px`
    await this.show(figure, place)
    this.apply()
  }

  parallelFigure(axes) {
    const figure = newFigure({
      height: 340, tools: "save", active_drag: null,
      x_range: new Bokeh.Range1d({start: -0.45, end: Math.max(axes.length, 1) - 0.55}), y_range: new Bokeh.Range1d({start: -0.06, end: 1.06}),
    })
    const heights = axes.map(positions), [ink, page] = ["--ink", "--page"].map(style)
    this.labels = []
    this.parallelLines = this.boxes.map((_, run) => {
      const name = this.data.runs[run]
      const source = new Bokeh.ColumnDataSource({data: {
        x: axes.map((_, index) => index), y: heights.map((values) => values[run] ?? NaN), run: axes.map(() => name),
        axis: axes.map((axis) => axis.name), value: axes.map((axis) => text(axis.values[run])),
      }})
      const own = [
        figure.line({field: "x"}, {field: "y"}, {source, line_color: this.colours[run], line_width: 2, line_alpha: 0.85, muted_alpha: 0.08, muted_color: this.colours[run]}),
        figure.scatter({field: "x"}, {field: "y"}, {source, fill_color: this.colours[run], line_color: page, size: 8, muted_alpha: 0.08, muted_color: this.colours[run]}),
      ]
      figure.add_tools(new Bokeh.HoverTool({renderers: [own[1]], visible: false, tooltips: [["run", "@run"], ["@axis", "@value"]]}))
      this.lines[run].push(...own)
      return own
    })
    axes.forEach((axis, index) => {
      figure.add_layout(new Bokeh.Span({location: index, dimension: "height", line_color: ink, line_alpha: 0.35, line_width: 1}))
      for (const [at, label] of this.ticks(axis)) {
        const shown = new Bokeh.Label({
          x: index, y: at, x_offset: 7, text: new Bokeh.PlainText({text: short(label, 14)}), text_baseline: "middle", text_color: ink, text_font_size: "11px",
          background_fill_color: page, background_fill_alpha: 0.75,
        })
        this.labels.push(shown)
        figure.add_layout(shown)
      }
    })
    figure.xaxis.ticker = new Bokeh.FixedTicker({ticks: axes.map((_, index) => index)})
    figure.xaxis.major_label_overrides = new Map(axes.map((axis, index) => [index, new Bokeh.PlainText({text: short(axis.name, 22)})]))
    Object.assign(figure.yaxis, {visible: false})
    figure.xgrid.visible = figure.ygrid.visible = false
    return figure
  }

  /* Positions and labels of some values of an axis: all texts, or round numbers between the ends. */
  ticks(axis) {
    const at = positions(axis), known = axis.values.map((value, run) => [at[run], value]).filter(([, value]) => value !== null)
    if (isText(axis)) return [...new Map(known.map(([place, value]) => [place, text(value)]))].slice(0, 12)
    const low = Math.min(...axis.values.filter((value) => value !== null)), high = Math.max(...axis.values)
    const middle = [0.25, 0.5, 0.75].map((part) => {
      const value = axis.log ? low ** (1 - part) * high ** part : low + (high - low) * part
      const rounded = Number(value.toPrecision(2)), scale = (each) => (axis.log ? Math.log(each) : each)
      return [(scale(rounded) - scale(low)) / (scale(high) - scale(low)), rounded]
    })
    const whole = axis.values.every((value) => value === null || Number.isInteger(value))
    const few = whole && new Set(known.map(([place]) => place)).size <= 6
    return (few ? [...new Map(known)] : [[0, low], ...middle, [1, high]]).map(([place, value]) => [place, text(value)])
  }

  // Heat map of tensors

  async startHeat() {
    const {heat, runs} = this.data
    if (!heat.names.length) return
    const known = heat.values.flat().filter((value) => value !== null)
    const low = Math.min(...known), high = Math.max(...known), rows = heat.names.length
    const mapper = new Bokeh.LinearColorMapper({palette: Bokeh.Palettes.Cividis256, low, high: high > low ? high : low + 1e-9, nan_color: "rgba(128,128,128,0.25)"})
    const data = {x: [], y: [], value: [], run: [], tensor: []}
    heat.values.forEach((values, row) => values.forEach((value, run) => {
      data.x.push(run)
      data.y.push(rows - 1 - row)
      data.value.push(value ?? NaN)
      data.run.push(runs[run])
      data.tensor.push(heat.names[row])
    }))
    const figure = newFigure({
      height: 90 + 20 * rows, x_range: new Bokeh.Range1d({start: -0.5, end: runs.length - 0.5}),
      y_range: new Bokeh.Range1d({start: -0.5, end: rows - 0.5}), tools: "save", active_drag: null,
    })
    const cells = figure.rect({field: "x"}, {field: "y"}, 1, 1, {
      source: new Bokeh.ColumnDataSource({data}), fill_color: {field: "value", transform: mapper}, line_color: style("--page"), line_width: 1,
    })
    figure.add_tools(new Bokeh.HoverTool({renderers: [cells], visible: false, tooltips: [["tensor", "@tensor"], ["run", "@run"], ["mean ψ (rad)", "@value{0.[0000]}"]]}))
    const narrow = innerWidth < 600, label = (name, length) => new Bokeh.PlainText({text: short(name, length)})
    figure.yaxis.ticker = new Bokeh.FixedTicker({ticks: heat.names.map((_, row) => row)})
    figure.yaxis.major_label_overrides = new Map(heat.names.map((name, row) => [rows - 1 - row, label(name, narrow ? 14 : 36)]))
    const every = Math.ceil(runs.length / (narrow ? 8 : 30))
    const ticks = runs.map((_, run) => run).filter((run) => run % every === 0)
    figure.xaxis.ticker = new Bokeh.FixedTicker({ticks})
    figure.xaxis.major_label_overrides = new Map(ticks.map((run) => [run, label(runs[run], 16)]))
    figure.xaxis.major_label_orientation = runs.length > 5 || narrow ? 0.9 : 0
    figure.xgrid.visible = figure.ygrid.visible = false
    const bar = element("i", {className: "bar"})
    bar.style.background = `linear-gradient(to right, ${hexadecimal(Bokeh.Palettes.Cividis256).filter((_, index) => index % 16 === 0).join(", ")})`
    find("heat-legend").append(element("span", {}, "mean ψ (rad)"), element("span", {}, text(low), bar, text(high)))
    find("heat-caption").hidden = false
    this.heatCells = cells
    await this.show(figure, find("heat"))
  }

  // Controls

  listen() {
    this.boxes.forEach((box, run) => {
      box.addEventListener("change", () => this.apply())
      const row = this.rows[run]
      row.addEventListener("pointerenter", () => this.emphasize(run))
      row.addEventListener("pointerleave", () => this.emphasize(null))
      box.addEventListener("focus", () => this.emphasize(run))
      box.addEventListener("blur", () => this.emphasize(null))
    })
    find("all").addEventListener("click", () => this.draw(true))
    find("none").addEventListener("click", () => this.draw(false))
    find("colour").addEventListener("change", () => { this.chooseColours(); this.recolour() })
    document.querySelectorAll("#overview thead button").forEach((button, column) => button.addEventListener("click", () => this.sort(button, column)))
    find("theme").addEventListener("change", () => this.restyle())
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.restyle())
    addEventListener("beforeprint", () => {
      document.documentElement.dataset.print = "yes"
      this.restyle()
      // The browser prints before it draws the next frame.
      for (const view of Bokeh.index.roots) {
        for (const drawn of view.computed_renderer_views ?? []) drawn.set_visuals?.()
        view.paint?.()
      }
    })
    addEventListener("afterprint", () => { delete document.documentElement.dataset.print; this.restyle() })
  }

  draw(all) {
    for (const box of this.boxes) box.checked = all
    this.apply()
  }

  apply() {
    this.lines.forEach((own, run) => own.forEach((line) => { line.visible = this.boxes[run].checked }))
  }

  emphasize(chosen) {
    this.lines.forEach((own, run) => own.forEach((line) => { line.muted = chosen !== null && run !== chosen }))
  }

  sort(button, column) {
    const body = this.rows[0].parentElement, header = button.closest("th")
    const descending = header.getAttribute("aria-sort") !== "descending" && column > 0
    const key = (row) => (column ? Number(row.cells[column].dataset.value || NaN) : row.cells[0].innerText)
    const compared = (one, other) => {
      const [a, b] = [key(one), key(other)]
      if (typeof a === "string") return a.localeCompare(b, undefined, {numeric: true})
      if (Number.isNaN(a) || Number.isNaN(b)) return Number(Number.isNaN(a)) - Number(Number.isNaN(b))
      return descending ? b - a : a - b
    }
    body.append(...[...this.rows].sort(compared))
    for (const each of document.querySelectorAll("#overview th")) each.removeAttribute("aria-sort")
    header.setAttribute("aria-sort", descending ? "descending" : "ascending")
  }

  chooseColours() {
    const chosen = find("colour").value, axis = chosen === "" ? null : this.data.axes[Number(chosen)]
    this.colours = coloursOf(axis, this.boxes.length)
    this.rows.forEach((row, run) => { row.querySelector("i").style.background = this.colours[run] })
    const legend = find("legend")
    legend.replaceChildren()
    if (axis && !isText(axis)) {
      const bar = element("i", {className: "bar"}), known = axis.values.filter((value) => value !== null)
      bar.style.background = `linear-gradient(to right, ${palette().filter((_, index) => index % 12 === 0).join(", ")})`
      legend.append(element("span", {}, axis.name), element("span", {}, text(Math.min(...known)), bar, text(Math.max(...known))))
      if (axis.log) legend.append(element("span", {className: "muted"}, "logarithmic"))
    } else {
      const names = axis ? axis.values.map(text) : this.data.runs
      const entries = [...new Map(names.map((name, run) => [name, this.colours[run]]))].sort(([one], [other]) => (axis ? one.localeCompare(other) : 0))
      for (const [name, colour] of entries.slice(0, 16)) {
        const key = element("i", {className: "line"})
        key.style.background = colour
        legend.append(element("span", {}, key, name))
      }
    }
  }

  recolour() {
    this.lines.forEach((own, run) => own.forEach((line) => {
      for (const glyph of [line.glyph, line.muted_glyph].filter(Boolean)) {
        if (glyph.fill_color !== undefined) glyph.fill_color = this.colours[run]
        if (glyph.type === "Line") glyph.line_color = this.colours[run]
      }
    }))
  }

  theme() {
    const root = document.documentElement, chosen = find("theme").value
    if (chosen === "auto") delete root.dataset.theme
    else root.dataset.theme = chosen
    const dark = chosen === "dark" || (chosen === "auto" && matchMedia("(prefers-color-scheme: dark)").matches)
    root.dataset.dark = dark && root.dataset.print === undefined ? "yes" : "no"
  }

  restyle() {
    this.theme()
    this.chooseColours()
    this.recolour()
    this.figures.forEach(themed)
    if (this.heatCells) this.heatCells.glyph.line_color = style("--page")
    for (const label of this.labels) label.setv({text_color: style("--ink"), background_fill_color: style("--page")})
  }
}

Bokeh.set_log_level("warn")
new Page(JSON.parse(find("data").textContent)).start().catch((error) => {
  const failure = find("failure")
  failure.hidden = false
  failure.textContent = `The figures could not be drawn: ${error}`
  throw error
})
