/* The interactive overview of a report. BokehJS draws the figures; this program selects what they show.

Texts of the user, such as names of tensors, are set as text and never as markup. */
"use strict"

const BINS = 400 // bins of a curve on a screen; fewer updates are drawn one by one
const NOT_FINITE = 65534, MISSING = 65535
const COLOURS = ["#0a84c9", "#d55e00", "#0e9f6e", "#b8579b", "#c98a00", "#6f6fd8", "#8a5a44", "#4f9da6"]
const STATUS_COLOURS = {
  effective: "#7fb8a4", orthogonal: "#e0c36a", obtuse: "#c8374a", zero_update: "#9a9a9a", zero_gradient: "#bdbdbd",
  non_finite: "#5b2a86", no_learning_rate: "#7a8fb8", unverifiable: "#b58863", not_logged: "#e4e4e4",
  underflow: "#8c6bb1", overflow: "#3f2b56", skipped: "#d9a5b3",
}
const VARIABLES = {
  angle: {label: "angle ψ (rad)", log: false, compared: true},
  condition_number: {label: "condition number κ", log: true, compared: true},
  update_to_weight: {label: "|θ′ − θ| / |θ|", log: true, compared: false},
  status: {label: "status", log: false, compared: true},
}
const KINDS = {run: "Runs", tensor: "Tensors", layer: "Layers", block: "Blocks", pattern: "Patterns"}

const find = (id) => document.getElementById(id)

function element(tag, properties = {}, ...children) {
  const found = Object.assign(document.createElement(tag), properties)
  found.append(...children)
  return found
}

function superscript(text) {
  return [...text].map((digit) => (digit === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit])).join("")
}

function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–"
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞"
  const size = Math.abs(value)
  if (value !== 0 && (size < 1e-3 || size >= 1e5)) {
    const [mantissa, exponent] = value.toExponential(3).split("e")
    return `${String(Number(mantissa)).replace("-", "−")}×10${superscript(String(Number(exponent)))}`
  }
  return String(Number(value.toPrecision(4))).replace("-", "−")
}

function percent(share) {
  if (share === null || Number.isNaN(share)) return "–"
  if (share > 0 && share < 0.001) return "< 0.1 %"
  if (share > 0.999 && share < 1) return "> 99.9 %"
  return `${Number((100 * share).toFixed(1))} %`
}

// Arrays of the page -------------------------------------------------------------------------------------------

const TYPES = {float64: Float64Array, float32: Float32Array, uint16: Uint16Array, uint8: Uint8Array}

class Arrays {
  static async unpack(text) {
    const packed = Uint8Array.from(atob(text.trim()), (letter) => letter.charCodeAt(0))
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"))
    return new Arrays(await new Response(stream).arrayBuffer())
  }

  constructor(buffer) {
    this.buffer = buffer
    this.known = new Map()
  }

  get(reference) {
    if (!this.known.has(reference)) this.known.set(reference, this.decode(reference))
    return this.known.get(reference)
  }

  decode({type, at, shape, low, step}) {
    const found = new TYPES[type](this.buffer, at, shape.reduce((size, axis) => size * axis, 1))
    if (step === undefined) return found
    return Float32Array.from(found, (code) =>
      code === MISSING ? NaN : code === NOT_FINITE ? Infinity : low + code * step)
  }
}

/* Values of rows in bins: `edges` are the positions of the updates at which bins start, and the end. */
class Cells {
  constructor(entry, arrays, updates, steps) {
    const values = arrays.get(entry.values ?? entry.status), shape = (entry.values ?? entry.status).shape
    this.bins = shape[shape.length - 1]
    this.rows = shape[shape.length - 2] ?? 1
    this.edges = entry.edges ?? Array.from({length: updates + 1}, (_, position) => position)
    this.steps = steps
    if (entry.status) {
      this.median = values
      this.share = Float32Array.from(arrays.get(entry.share), (share) => share / (entry.exact ? 1 : 200))
    } else {
      const size = this.rows * this.bins, part = (index) => values.subarray(index * size, (index + 1) * size)
      const single = shape[0] === 1
      this.median = part(0)
      this.least = single ? this.median : part(1)
      this.greatest = single ? this.median : part(2)
    }
  }

  /* Bin that contains a position; -1 if none does. */
  binOf(position) {
    if (position < this.edges[0] || position >= this.edges[this.bins]) return -1
    let low = 0, high = this.bins
    while (high - low > 1) {
      const middle = (low + high) >> 1
      if (this.edges[middle] <= position) low = middle
      else high = middle
    }
    return low
  }
}

/* First position whose step is at least a value. */
function positionOf(steps, value) {
  let low = 0, high = steps.length
  while (low < high) {
    const middle = (low + high) >> 1
    if (steps[middle] < value) low = middle + 1
    else high = middle
  }
  return low
}

/* Curve of one row between two positions: x, median, least and greatest of each bin, at most BINS of them. */
function curveOf(cells, row, first, last, log) {
  const begin = Math.max(cells.binOf(Math.max(first, cells.edges[0])), 0)
  const bound = cells.binOf(Math.min(last, cells.edges[cells.bins] - 1))
  const end = bound < 0 ? cells.bins : bound + 1
  const offset = row * cells.bins, stride = end - begin > 2 * BINS ? Math.ceil((end - begin) / BINS) : 1
  const found = {x: [], y: [], low: [], high: [], first: [], last: []}
  const shown = log ? (value) => (Number.isFinite(value) ? 10 ** value : NaN) : (value) => (Number.isFinite(value) ? value : NaN)
  for (let bin = begin; bin < end; bin += stride) {
    const stop = Math.min(bin + stride, end)
    let median = cells.median[offset + bin], least = cells.least[offset + bin], greatest = cells.greatest[offset + bin]
    if (stop - bin > 1) {
      const part = (values) => Array.from(values.subarray(offset + bin, offset + stop)).filter((value) => !Number.isNaN(value))
      const ordered = part(cells.median).sort((one, other) => one - other)
      median = ordered.length ? ordered[(ordered.length - 1) >> 1] : NaN
      least = Math.min(...part(cells.least), Infinity)
      greatest = Math.max(...part(cells.greatest), -Infinity)
    }
    const from = cells.steps[cells.edges[bin]], to = cells.steps[cells.edges[stop] - 1]
    found.x.push((from + to) / 2)
    found.y.push(shown(median))
    found.low.push(shown(least))
    found.high.push(shown(greatest))
    found.first.push(from)
    found.last.push(to)
  }
  return found
}

// The overview -------------------------------------------------------------------------------------------------

class Overview {
  constructor(page, arrays) {
    this.page = page
    this.arrays = arrays
    this.figures = {}
    this.selected = new Set()
    this.sorting = {column: "worst", descending: false}
    this.search = ""
    this.zoomed = this.zoomedModel = null
    this.drag = matchMedia("(pointer: coarse)").matches ? "none" : "zoom"
  }

  get run() {
    return this.page.runs[this.runIndex]
  }

  get kind() {
    const kinds = [...this.run.kinds, ...(this.page.compared ? [this.page.compared] : [])]
    return kinds.find((each) => each.kind === this.kindName) ?? kinds[0]
  }

  /* Key of a variable of rows: the values that the page has for the chosen estimate and window, or null. */
  keyOf(variable) {
    if (variable === "update_to_weight") return variable
    return this.kindName === "run" ? `${variable}|${this.run.descents[0]}|1` : `${variable}|${this.descent}|${this.window}`
  }

  cells(variable) {
    const key = this.keyOf(variable), kind = this.kind
    const zoomed = this.zoomed?.kind === kind ? this.zoomed.cells[key] : undefined
    return zoomed ?? this.cellsOf(kind, key)
  }

  cellsOf(kind, key) {
    const entry = kind.values[key]
    if (!entry) return null
    if (!entry.cells) {
      const steps = kind.steps ? this.arrays.get(kind.steps) : this.steps
      entry.cells = new Cells({edges: kind.edges, ...entry}, this.arrays, steps.length, steps)
    }
    return entry.cells
  }

  model(variable, descent = this.descent, window = this.window) {
    const zoomed = this.zoomedModel?.[`${variable}|${descent}|${window}`]
    if (zoomed) return zoomed
    const entry = this.run.model[variable] ?? this.run.model[`${variable}|${descent}|${window}`]
      ?? this.run.model[`${variable}|${window}`]
    if (!entry) return null
    entry.cells ??= new Cells({exact: true, ...entry}, this.arrays, this.steps.length, this.steps)
    return entry.cells
  }

  // Controls

  async start() {
    const {page} = this
    fill(find("run"), page.runs.map((run, index) => [index, run.name]))
    find("run").closest("label").hidden = page.runs.length < 2
    on("run", "change", () => this.chooseRun(Number(find("run").value)))
    on("rows", "change", () => this.chooseKind(find("rows").value))
    on("descent", "change", () => { this.descent = find("descent").value; this.reload() })
    on("window", "change", () => { this.window = Number(find("window").value); this.reload() })
    on("colour", "change", () => { this.drawHeat(); this.legend() })
    on("search", "input", () => { this.search = find("search").value; this.drawTable(); this.drawHeat() })
    on("step", "input", () => this.chooseStep(Number(find("step").value)))
    on("step-number", "change", () => this.chooseStep(this.nearest(Number(find("step-number").value))))
    on("drag", "change", () => { this.drag = find("drag").value; this.applyDrag() })
    on("clear", "click", () => { this.selected.clear(); this.selectionChanged() })
    on("zoom-in", "click", () => this.zoom(0.5))
    on("zoom-out", "click", () => this.zoom(2))
    on("earlier", "click", () => this.pan(-0.25))
    on("later", "click", () => this.pan(0.25))
    on("reset", "click", () => this.showAll())
    on("theme", "change", () => this.theme())
    find("drag").value = this.drag
    find("plots").addEventListener("keydown", (event) => this.key(event))
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.applyTheme())
    addEventListener("beforeprint", () => {
      document.documentElement.dataset.print = "yes"
      this.applyTheme()
      // The browser prints before it draws the next frame.
      for (const view of Bokeh.index.roots) {
        for (const drawn of view.computed_renderer_views ?? []) drawn.set_visuals?.()
        view.paint?.()
      }
    })
    addEventListener("afterprint", () => { delete document.documentElement.dataset.print; this.applyTheme() })
    const first = page.runs.findIndex((run) => run.gradient)
    await this.chooseRun(Math.max(first, 0), page.compared ? "run" : undefined)
  }

  async chooseRun(index, kind) {
    this.runIndex = index
    find("run").value = String(index)
    this.steps = this.arrays.get(this.run.steps)
    fill(find("descent"), this.run.descents.map((name) => [name, this.page.descents[name] ?? name]))
    fill(find("window"), this.run.windows.map((window) => [window, window === 1 ? "1 update" : `${window} updates`]))
    this.descent = this.run.descents[0]
    this.window = this.run.windows[0]
    find("descent").closest("label").hidden = this.run.descents.length < 2
    find("window").closest("label").hidden = this.run.windows.length < 2
    const kinds = [...(this.page.compared ? ["run"] : []), ...this.run.kinds.map((each) => each.kind)]
    fill(find("rows"), kinds.map((name) => [name, KINDS[name] ?? name]))
    this.kindName = kind ?? (kinds.includes(this.kindName) ? this.kindName : this.run.kinds[0].kind)
    find("rows").value = this.kindName
    this.selected.clear()
    this.zoomed = this.zoomedModel = null
    const slider = find("step")
    slider.max = String(Math.max(this.steps.length - 1, 0))
    this.position = 0
    const colours = this.run.gradient ? Object.keys(VARIABLES) : ["update_to_weight"]
    fill(find("colour"), colours.map((name) => [name, VARIABLES[name].label]))
    this.selectFirst()
    await this.build()
    this.chooseStep(0)
    this.fetchZoomed()
  }

  /* Select the worst rows, so that the page shows at once where to look. */
  selectFirst() {
    const rows = this.orderOf("worst", false)
    const count = this.kindName === "run" ? Math.min(rows.length, COLOURS.length) : rows.length > 1 ? Math.min(2, rows.length) : 0
    this.selected = new Set(rows.slice(0, count))
  }

  chooseKind(name) {
    this.kindName = name
    this.zoomed = this.zoomedModel = null
    this.sorting = {column: "worst", descending: false}
    this.selectFirst()
    this.selectionChanged()
    this.fetchZoomed()
  }

  reload() {
    this.zoomed = this.zoomedModel = null
    this.selectionChanged()
    this.chooseStep(this.position)
    this.fetchZoomed()
  }

  selectionChanged() {
    this.drawTable()
    this.drawCurves()
    this.drawHeat()
    this.legend()
  }

  toggle(row) {
    if (this.selected.has(row)) this.selected.delete(row)
    else this.selected.add(row)
    this.selectionChanged()
  }

  colourOf(row) {
    return COLOURS[[...this.selected].indexOf(row) % COLOURS.length]
  }

  nearest(step) {
    const position = positionOf(this.steps, step), last = this.steps.length - 1
    if (position > last) return last
    return position > 0 && step - this.steps[position - 1] < this.steps[position] - step ? position - 1 : position
  }

  chooseStep(position) {
    if (!this.steps.length) return
    this.position = Math.min(Math.max(position, 0), this.steps.length - 1)
    const step = this.steps[this.position]
    find("step").value = String(this.position)
    find("step").setAttribute("aria-valuetext", `step ${step}`)
    find("step-number").value = String(step)
    for (const {span} of Object.values(this.figures)) span.location = step
    const values = [["step", String(step)]]
    const read = (variable, label, log) => {
      const cells = this.model(variable)
      if (!cells) return
      const value = cells.median[cells.binOf(this.position)]
      values.push([label, number(log ? 10 ** value : value)])
    }
    read("loss", "loss", false)
    read("angle", "ψ (rad)", false)
    read("condition_number", "κ", true)
    read("update_to_weight", VARIABLES.update_to_weight.label, true)
    const status = this.model("status")
    if (status) values.push(["status", this.statusText(status.median[status.binOf(this.position)])])
    find("readout").replaceChildren(...values.map(([name, value]) =>
      element("div", {}, element("dt", {textContent: name}), element("dd", {textContent: value}))))
    this.atStep()
  }

  statusText(code) {
    return (this.page.statuses[code]?.name ?? "–").replaceAll("_", " ")
  }

  // Range of steps

  /* First visible update. */
  positionAt() {
    return positionOf(this.steps, this.range.start)
  }

  get wholeRange() {
    const steps = this.kind.steps ? this.arrays.get(this.kind.steps) : this.steps
    const first = steps[0] ?? 0, last = steps[steps.length - 1] ?? 1
    const margin = 0.01 * (last - first) || 0.5
    return [first - margin, last + margin]
  }

  setRange(start, end) {
    const [first, last] = this.wholeRange
    const width = Math.min(Math.max(end - start, Math.min(2, last - first)), last - first)
    const begin = Math.min(Math.max(start, first), last - width)
    this.range.setv({start: begin, end: begin + width})
  }

  zoom(factor) {
    const {start, end} = this.range, width = (end - start) * factor
    const cursor = this.steps[this.position], inside = cursor >= start && cursor <= end
    const middle = inside ? cursor : (start + end) / 2, share = (middle - start) / (end - start)
    this.setRange(middle - share * width, middle + (1 - share) * width)
  }

  pan(share) {
    const {start, end} = this.range
    this.setRange(start + share * (end - start), end + share * (end - start))
  }

  showAll() {
    const [start, end] = this.wholeRange
    this.range.setv({start, end})
  }

  key(event) {
    if (event.target !== find("plots") || event.ctrlKey || event.metaKey || event.altKey) return
    const far = Math.max(1, Math.round(this.steps.length / 50))
    const actions = {
      ArrowLeft: () => this.chooseStep(this.position - 1), ArrowRight: () => this.chooseStep(this.position + 1),
      PageDown: () => this.chooseStep(this.position + far), PageUp: () => this.chooseStep(this.position - far),
      Home: () => this.chooseStep(0), End: () => this.chooseStep(this.steps.length - 1),
      "+": () => this.zoom(0.5), "=": () => this.zoom(0.5), "-": () => this.zoom(2), "0": () => this.showAll(),
      "[": () => this.pan(-0.25), "]": () => this.pan(0.25),
    }
    const action = actions[event.key]
    if (!action) return
    event.preventDefault()
    action()
  }

  rangeChanged() {
    if (this.waiting) return
    this.waiting = requestAnimationFrame(() => {
      this.waiting = 0
      this.drawCurves()
      this.fetchZoomed()
    })
  }

  /* Values of each update, or finer bins, of the visible steps, if a server sends them. */
  fetchZoomed() {
    if (!this.page.served || this.kindName === "run") return
    clearTimeout(this.fetching)
    this.fetching = setTimeout(async () => {
      const kind = this.kind, start = positionOf(this.steps, this.range.start), stop = positionOf(this.steps, this.range.end)
      if (stop <= start) return
      const wanted = this.run.gradient ? Object.keys(VARIABLES) : ["update_to_weight"]
      const {descent, window, runIndex} = this, cells = {}, model = {}
      const receive = async (kindName, variable) => {
        const query = new URLSearchParams({run: runIndex, kind: kindName, variable, descent, window, start, stop})
        const answer = await fetch(`values?${query}`)
        if (!answer.ok) throw new Error(await answer.text())
        const {entry, arrays} = await answer.json()
        return new Cells(entry, await Arrays.unpack(arrays), this.steps.length, this.steps)
      }
      for (const variable of wanted) {
        cells[this.keyOf(variable)] = await receive(kind.kind, variable)
        model[`${variable}|${descent}|${window}`] = await receive("model", variable)
      }
      const same = kind === this.kind && descent === this.descent && window === this.window && runIndex === this.runIndex
      if (!same) return
      this.zoomed = {kind, cells}
      this.zoomedModel = model
      this.drawCurves()
      this.drawHeat()
      this.atStep()
    }, 150)
  }

  // Figures

  async build() {
    const {Range1d} = Bokeh
    const [start, end] = this.wholeRange
    this.range = new Range1d({start, end})
    for (const name of ["start", "end"]) this.range.properties[name].change.connect(() => this.rangeChanged())
    this.figures = {}
    this.placed = []
    const wanted = []
    if (this.run.gradient) wanted.push(["angle", "angle ψ (rad)", false], ["condition_number", "condition number κ", true])
    wanted.push(["update_to_weight", VARIABLES.update_to_weight.label, true], ["loss", "loss", this.isWide("loss")])
    const charts = find("charts")
    charts.replaceChildren()
    for (const [name, label, log] of wanted) {
      this.figures[name] = this.curveFigure(name, label, log)
      this.place(charts, this.figures[name], `${label} over the steps`)
    }
    find("heat").replaceChildren()
    if (Object.keys(this.kind.values).length || this.page.served) {
      this.figures.heat = this.heatFigure()
      this.place(find("heat"), this.figures.heat, "heat map over the steps")
    }
    this.buildPaper()
    // Values and colours are set first, so that each figure is drawn once.
    this.drawTable()
    this.drawHeat()
    this.applyTheme()
    await this.show()
    this.applyDrag()
  }

  place(parent, found, meaning) {
    found.target = element("div", {className: "plot", role: "img"})
    found.target.setAttribute("aria-label", `${meaning} of ${this.run.name}`)
    parent.append(found.target)
    this.placed.push(found)
  }

  /* Draw the figures. They share the range of steps, so they belong to one document. */
  async show() {
    this.views?.clear()
    const drawing = new Bokeh.Document()
    for (const {figure} of this.placed) drawing.add_root(figure)
    const targets = this.placed.map(({target}) => target)
    this.views = await Bokeh.embed.add_document_standalone(drawing, document.body, targets)
  }

  /* True if a positive variable covers a factor of ten. */
  isWide(variable) {
    const values = this.model(variable)
    const finite = values ? Array.from(values.least).filter(Number.isFinite) : []
    const least = finite.reduce((low, value) => Math.min(low, value), Infinity)
    const greatest = finite.reduce((high, value) => Math.max(high, value), -Infinity)
    return least > 0 && greatest >= 10 * least
  }

  plot(label, log, height, range = this.range) {
    const figure = Bokeh.Plotting.figure({
      height, sizing_mode: "stretch_width", tools: [], toolbar_location: null, x_range: range,
      y_range: new Bokeh.Range1d({start: log ? 1 : 0, end: log ? 10 : 1}), y_axis_type: log ? "log" : "linear",
      min_border_left: 58, min_border_right: 12,
    })
    figure.toolbar.logo = null
    figure.yaxis.axis_label = new Bokeh.PlainText({text: label})
    figure.xaxis.axis_label = "step"
    const span = new Bokeh.Span({location: 0, dimension: "height", line_width: 1, line_dash: [3, 3]})
    figure.add_layout(span)
    return {figure, span, log, curves: new Map()}
  }

  withTools(found) {
    const {figure} = found
    found.tools = {
      zoom: new Bokeh.BoxZoomTool({dimensions: "width"}), pan: new Bokeh.PanTool({dimensions: "width"}),
    }
    const wheel = new Bokeh.WheelZoomTool({dimensions: "width", modifiers: {ctrl: true}})
    figure.add_tools(found.tools.zoom, found.tools.pan, wheel)
    figure.toolbar.active_scroll = wheel
    figure.on_event("tap", (event) => this.tapped(found, event.x, event.y))
    figure.on_event("doubletap", () => this.showAll())
    return found
  }

  curveFigure(name, label, log) {
    const found = this.withTools(this.plot(label, log, 245))
    const {figure} = found
    found.name = name
    if (name === "angle") {
      const half = new Bokeh.Span({location: Math.PI / 2, dimension: "width", line_color: "#c8374a", line_dash: [6, 4]})
      figure.add_layout(half)
    }
    if (name !== "loss" && this.run.gradient) {
      found.gaps = new Bokeh.ColumnDataSource({data: {x0: [], x1: [], alpha: []}})
      figure.vstrip({
        x0: {field: "x0"}, x1: {field: "x1"}, source: found.gaps, fill_color: "#c8374a", line_color: null,
        fill_alpha: {field: "alpha"}, level: "underlay",
      })
    }
    return found
  }

  /* Sources and glyphs of a curve; they are made once, and get new values. */
  curve(found, key, width) {
    if (!found.curves.has(key)) {
      const source = new Bokeh.ColumnDataSource({data: {x: [], y: [], low: [], high: [], first: [], last: []}})
      const single = new Bokeh.ColumnDataSource({data: {x: [], y: []}})
      const {figure} = found
      const band = figure.varea({field: "x"}, {field: "low"}, {field: "high"}, {source, fill_alpha: 0.22})
      const line = figure.line({field: "x"}, {field: "y"}, {source, line_width: width, line_join: "round"})
      const dots = figure.scatter({field: "x"}, {field: "y"}, {source: single, size: 4, line_color: null})
      found.curves.set(key, {source, single, band, line, dots})
      if (key === "model") this.hover(found, line)
    }
    return found.curves.get(key)
  }

  hover(found, line) {
    found.figure.add_tools(new Bokeh.HoverTool({
      mode: "vline", renderers: [line], attachment: "horizontal", line_policy: "nearest",
      tooltips: (_, {index}) => this.tooltip(found, index ?? 0),
    }))
  }

  tooltip(found, index) {
    const rows = []
    let heading = ""
    for (const [key, {source, line}] of found.curves) {
      if (!line.visible) continue
      const {x, y, low, high, first, last} = source.data
      const main = found.curves.get("model").source.data
      if (key === "model") heading = first[index] === last[index] ? `step ${first[index]}` : `steps ${first[index]} to ${last[index]}`
      let nearest = index
      if (key !== "model") {
        nearest = positionOf(x, main.x[index])
        if (nearest > 0 && (nearest === x.length || main.x[index] - x[nearest - 1] < x[nearest] - main.x[index])) nearest -= 1
      }
      if (nearest >= y.length) continue
      const range = low[nearest] === high[nearest] ? "" : ` (${number(low[nearest])} to ${number(high[nearest])})`
      rows.push([key === "model" ? this.modelName : this.kind.rows[key], `${number(y[nearest])}${range}`, line.glyph.line_color])
    }
    return tooltipOf(heading, rows)
  }

  get modelName() {
    return this.page.runs.length > 1 ? this.run.name : "model"
  }

  drawCurves() {
    const first = Math.max(positionOf(this.steps, this.range.start) - 1, 0)
    const last = Math.min(positionOf(this.steps, this.range.end), this.steps.length - 1)
    const ink = colour("--ink")
    for (const [name, found] of Object.entries(this.figures)) {
      if (name === "heat" || name === "spectrum" || name === "average") continue
      const lines = [], wanted = new Set()
      const add = (key, cells, row, shade, width, from, to) => {
        const values = curveOf(cells, row, from, to, cells.log), drawn = this.curve(found, key, width)
        wanted.add(key)
        drawn.source.data = values
        drawn.single.data = isolated(values)
        drawn.line.glyph.line_color = shade
        drawn.band.glyph.fill_color = shade
        drawn.dots.glyph.fill_color = shade
        lines.push(values)
      }
      const model = this.model(name)
      if (model && this.steps.length) {
        model.log = name in VARIABLES && VARIABLES[name].log
        add("model", model, 0, ink, 2, first, last)
      }
      const cells = name in VARIABLES ? this.cells(name) : null
      if (cells) {
        cells.log = VARIABLES[name].log
        const steps = cells.steps
        const from = Math.max(positionOf(steps, this.range.start) - 1, 0), to = Math.min(positionOf(steps, this.range.end), steps.length - 1)
        for (const row of this.selected) {
          if (this.kindName === "run" && row === this.runIndex) continue
          add(row, cells, row, this.colourOf(row), 1.5, from, to)
        }
      }
      for (const [key, {band, line, dots}] of found.curves) {
        for (const renderer of [band, line, dots]) renderer.visible = wanted.has(key)
      }
      this.fit(found, lines)
      if (found.gaps) found.gaps.data = this.gaps(first, last)
    }
    this.drawPaper(first, last)
  }

  /* Steps at which the model has no metric. */
  gaps(first, last) {
    const status = this.model("status"), found = {x0: [], x1: [], alpha: []}
    if (!status) return found
    const stride = Math.max(1, Math.ceil((last - first) / BINS))
    for (let position = first; position <= last; position += stride) {
      let without = 0, count = 0
      for (let each = position; each < Math.min(position + stride, last + 1); each += 1, count += 1) {
        const bin = status.binOf(each)
        without += status.share ? 1 - status.share[bin] : 0
      }
      if (!without) continue
      const half = (this.steps[1] - this.steps[0] || 1) / 2, end = Math.min(position + stride, last + 1) - 1
      found.x0.push(this.steps[position] - half)
      found.x1.push(this.steps[end] + half)
      found.alpha.push(0.05 + 0.15 * (without / count))
    }
    return found
  }

  /* Set the limits of the y axis to those of the visible values. */
  fit(found, lines) {
    let low = Infinity, high = -Infinity
    for (const line of lines) {
      for (const values of [line.low, line.high]) {
        for (const value of values) {
          if (Number.isNaN(value) || (found.log && value <= 0)) continue
          low = Math.min(low, value)
          high = Math.max(high, value)
        }
      }
    }
    if (low > high) return
    if (found.log) {
      const margin = Math.max(0.04 * Math.log10(high / low), 0.02)
      found.figure.y_range.setv({start: low / 10 ** margin, end: high * 10 ** margin})
    } else {
      const margin = 0.05 * (high - low) || 0.05 * Math.abs(high) || 0.5
      found.figure.y_range.setv({start: low - margin, end: high + margin})
    }
  }

  heatFigure() {
    const found = this.withTools(this.plot("", false, 300))
    const {figure} = found
    found.source = new Bokeh.ColumnDataSource({data: {image: [], x: [], y: [], dw: [], dh: []}})
    found.mapper = new Bokeh.LinearColorMapper({palette: ["#000000", "#ffffff"], low: 0, high: 1, nan_color: "rgba(128,128,128,0.18)"})
    found.image = figure.image({
      image: {field: "image"}, x: {field: "x"}, y: {field: "y"}, dw: {field: "dw"}, dh: {field: "dh"},
      source: found.source, color_mapper: found.mapper,
    })
    figure.add_tools(new Bokeh.HoverTool({
      renderers: [found.image], tooltips: (_, {x, y}) => this.heatTooltip(x, y),
    }))
    figure.yaxis.ticker = new Bokeh.FixedTicker({ticks: []})
    figure.ygrid.visible = false
    figure.xgrid.visible = false
    return found
  }

  get heatVariable() {
    return find("colour").value || "angle"
  }

  drawHeat() {
    const found = this.figures.heat, variable = this.heatVariable, cells = this.cells(variable)
    find("heat-missing").hidden = Boolean(cells)
    find("heat").hidden = !cells
    if (!found || !cells) return
    const rows = this.order, {steps, edges, bins} = cells
    const first = steps[edges[0]], last = steps[edges[bins] - 1]
    const uniform = (last - first) === (edges[bins] - 1 - edges[0]) * (steps[1] - steps[0] || 1)
    const columns = uniform ? bins : Math.min(1000, Math.max(bins, 200))
    const pick = Int32Array.from({length: columns}, (_, column) => {
      if (uniform) return column
      return cells.binOf(Math.min(positionOf(steps, first + ((column + 0.5) / columns) * (last - first)), edges[bins] - 1))
    })
    const image = new Float32Array(Math.max(rows.length, 1) * columns).fill(NaN)
    let low = Infinity, high = -Infinity
    rows.forEach((row, index) => {
      const line = (rows.length - 1 - index) * columns
      for (let column = 0; column < columns; column += 1) {
        const value = cells.median[row * bins + pick[column]]
        image[line + column] = Number.isFinite(value) ? value : NaN
        if (Number.isFinite(value)) {
          low = Math.min(low, value)
          high = Math.max(high, value)
        }
      }
    })
    const status = variable === "status"
    const palette = this.page.statuses.map(({name}) => STATUS_COLOURS[name])
    if (status) found.mapper.setv({palette, low: -0.5, high: palette.length - 0.5})
    else found.mapper.setv({palette: heatPalette(variable), low: low > high ? 0 : low, high: low >= high ? (low > high ? 1 : low + 1e-9) : high})
    found.limits = [low, high]
    const half = uniform ? (steps[1] - steps[0] || 1) / 2 : 0
    const {ndarray} = Bokeh.require("core/util/ndarray")
    found.source.data = {
      image: [ndarray(image, {dtype: "float32", shape: [Math.max(rows.length, 1), columns]})], x: [first - half], y: [0],
      dw: [last - first + 2 * half || 1], dh: [Math.max(rows.length, 1)],
    }
    found.figure.y_range.setv({start: 0, end: Math.max(rows.length, 1)})
    found.figure.height = Math.min(Math.max(16 * rows.length, 120), 420) + 50
    const labelled = rows.length <= 24 && find("heat").clientWidth > 560
    const ticks = labelled ? rows.map((_, index) => rows.length - 0.5 - index) : []
    const texts = new Map(rows.map((row, index) => [rows.length - 0.5 - index, new Bokeh.PlainText({text: shortened(this.kind.rows[row], 26)})]))
    found.figure.yaxis.major_label_overrides = texts
    found.figure.yaxis.ticker = new Bokeh.FixedTicker({ticks})
    this.heatLegend()
  }

  heatLegend() {
    const found = this.figures.heat, variable = this.heatVariable, target = find("heat-legend")
    target.replaceChildren()
    if (!found) return
    if (variable === "status") {
      const cells = this.cells("status"), present = new Set(cells ? Array.from(cells.median) : [])
      this.page.statuses.forEach(({name}, code) => {
        if (!present.has(code)) return
        const key = element("i", {className: "key"})
        key.style.background = STATUS_COLOURS[name]
        target.append(element("span", {}, key, name.replaceAll("_", " ")))
      })
      target.append(element("span", {className: "muted", textContent: "A cell shows its most frequent status that is not effective."}))
      return
    }
    const [low, high] = found.limits
    if (low > high) {
      target.append("no values")
      return
    }
    const bar = element("i", {className: "bar"}), log = VARIABLES[variable].log
    bar.style.background = `linear-gradient(to right, ${heatPalette(variable).filter((_, index) => index % 16 === 0).join(", ")})`
    target.append(element("span", {textContent: number(log ? 10 ** low : low)}), bar, element("span", {textContent: `${number(log ? 10 ** high : high)} ${log ? "(logarithmic)" : "rad"}`}))
  }

  heatTooltip(x, y) {
    const rows = this.order, row = rows[rows.length - 1 - Math.floor(y)], cells = this.cells(this.heatVariable)
    if (row === undefined || !cells) return element("div")
    const at = this.nearestIn(cells.steps, x), bin = cells.binOf(at), offset = row * cells.bins + bin
    if (bin < 0) return element("div")
    const from = cells.steps[cells.edges[bin]], to = cells.steps[cells.edges[bin + 1] - 1]
    const heading = from === to ? `step ${from}` : `steps ${from} to ${to}`
    const variable = this.heatVariable, log = VARIABLES[variable].log, value = (each) => number(log ? 10 ** each : each)
    let text
    if (variable === "status") text = `${this.statusText(cells.median[offset])}; ${percent(cells.share[offset])} effective`
    else {
      text = value(cells.median[offset])
      if (cells.least[offset] !== cells.greatest[offset]) text += ` (${value(cells.least[offset])} to ${value(cells.greatest[offset])})`
    }
    return tooltipOf(heading, [[this.kind.rows[row], text, this.selected.has(row) ? this.colourOf(row) : null]])
  }

  nearestIn(steps, x) {
    const position = positionOf(steps, x), last = steps.length - 1
    if (position > last) return last
    return position > 0 && x - steps[position - 1] < steps[position] - x ? position - 1 : position
  }

  tapped(found, x, y) {
    if (found === this.figures.heat) {
      const row = this.order[this.order.length - 1 - Math.floor(y)]
      if (row !== undefined) this.toggle(row)
    }
    this.chooseStep(this.nearest(x))
  }

  applyDrag() {
    for (const {figure, tools} of Object.values(this.figures)) {
      if (tools) figure.toolbar.active_drag = tools[this.drag] ?? null
    }
  }

  // Table

  get columns() {
    const columns = [["name", KINDS[this.kindName] ?? "Rows"]]
    if (this.run.gradient || this.kindName === "run") columns.push(["share", "Effective"], ["angle", "Median ψ"], ["condition_number", "Median κ"])
    columns.push(["update_to_weight", "Median |θ′ − θ| / |θ|"], ["at", this.run.gradient ? "ψ at step" : "|θ′ − θ| / |θ| at step"])
    return columns
  }

  value(row, column) {
    if (column === "name") return this.kind.rows[row]
    if (column === "at") return this.valueAtStep(row)
    return this.kind.summary[column]?.[row] ?? null
  }

  valueAtStep(row) {
    const variable = this.run.gradient ? "angle" : "update_to_weight", cells = this.cells(variable)
    if (!cells) return null
    const position = cells.steps === this.steps ? this.position : this.nearestIn(cells.steps, this.steps[this.position])
    const bin = cells.binOf(position)
    if (bin < 0) return null
    const value = cells.median[row * cells.bins + bin]
    return Number.isNaN(value) ? null : VARIABLES[variable].log ? 10 ** value : value
  }

  orderOf(column, descending) {
    const rows = this.kind.rows.map((_, row) => row), summary = this.kind.summary
    const words = this.search.toLowerCase().split(/\s+/).filter(Boolean)
    const shown = rows.filter((row) => words.every((word) => this.kind.rows[row].toLowerCase().includes(word)))
    const missingLast = (one, other) => (one === null) - (other === null)
    if (column === "worst") {
      const share = summary.share ?? [], angle = summary.angle ?? summary.update_to_weight ?? []
      return shown.sort((one, other) => (share[one] ?? 2) - (share[other] ?? 2) || (angle[other] ?? -1) - (angle[one] ?? -1) || one - other)
    }
    const sign = descending ? -1 : 1
    return shown.sort((one, other) => {
      const [first, second] = [this.value(one, column), this.value(other, column)]
      if (first === null || second === null) return missingLast(first, second) || one - other
      if (column === "name") return sign * first.localeCompare(second, undefined, {numeric: true})
      return sign * (first - second) || one - other
    })
  }

  drawTable() {
    this.order = this.orderOf(this.sorting.column, this.sorting.descending)
    const head = find("rows-head"), body = find("rows-body")
    head.replaceChildren(element("th", {scope: "col", className: "pick"}, element("span", {className: "hidden", textContent: "Draw"})),
      ...this.columns.map(([column, label]) => {
        const cell = element("th", {scope: "col", className: column === "name" ? "" : "n"})
        const sorted = this.sorting.column === column
        cell.setAttribute("aria-sort", sorted ? (this.sorting.descending ? "descending" : "ascending") : "none")
        const button = element("button", {type: "button", textContent: label + (sorted ? (this.sorting.descending ? " ▼" : " ▲") : "")})
        button.dataset.column = column
        button.addEventListener("click", () => this.sort(column))
        cell.append(button)
        return cell
      }))
    body.replaceChildren(...this.order.map((row) => this.tableRow(row)))
    const shown = this.order.length, total = this.kind.rows.length
    find("rows-count").textContent = shown === total ? `${total}` : `${shown} of ${total}`
    find("rows-table").setAttribute("aria-label", KINDS[this.kindName] ?? "Rows")
  }

  tableRow(row) {
    const line = element("tr"), box = element("input", {type: "checkbox", checked: this.selected.has(row)})
    box.setAttribute("aria-label", `Draw ${this.kind.rows[row]}`)
    box.addEventListener("change", () => { this.keepFocus = row; this.toggle(row); this.refocus() })
    const pick = element("td", {className: "pick"}, box)
    if (this.selected.has(row)) pick.style.setProperty("--mark", this.colourOf(row))
    line.dataset.row = row
    line.append(pick)
    for (const [column] of this.columns) {
      const value = this.value(row, column)
      if (column === "name") {
        const link = element("button", {type: "button", textContent: value, className: "row-name", tabIndex: -1})
        link.addEventListener("click", () => { this.keepFocus = row; this.toggle(row); this.refocus() })
        line.append(element("th", {scope: "row"}, link))
      } else {
        const text = column === "share" ? percent(value) : number(value)
        const cell = element("td", {className: "n", textContent: text})
        cell.dataset.column = column
        line.append(cell)
      }
    }
    return line
  }

  refocus() {
    find("rows-body").querySelector(`[data-row="${this.keepFocus}"] input`)?.focus({preventScroll: true})
  }

  sort(column) {
    const {sorting} = this, again = sorting.column === column
    this.sorting = {column, descending: again ? !sorting.descending : column !== "name" && column !== "share"}
    this.drawTable()
    this.drawHeat()
    find("rows-head").querySelector(`[data-column="${column}"]`).focus()
  }

  /* Update the column of the values at the chosen step. */
  atStep() {
    for (const line of find("rows-body").children) {
      const cell = line.querySelector('[data-column="at"]')
      cell.textContent = number(this.valueAtStep(Number(line.dataset.row)))
    }
  }

  legend() {
    const entries = [[this.modelName, colour("--ink")]]
    for (const row of this.selected) {
      if (this.kindName === "run" && row === this.runIndex) continue
      entries.push([this.kind.rows[row], this.colourOf(row)])
    }
    find("legend").replaceChildren(...entries.map(([name, shade]) => {
      const key = element("i", {className: "line"})
      key.style.background = shade
      return element("span", {}, key, name)
    }))
    const missing = !this.page.served && this.kindName !== "run" && this.run.gradient && !this.cells("angle")
    find("rows-missing").hidden = !missing
  }

  // Figure 3 of the paper

  buildPaper() {
    this.paper = null
    if (!find("figure-3")) return
    const target = find("paper-figures")
    target.replaceChildren()
    find("figure-3").hidden = !this.run.gradient
    if (!this.run.gradient) return
    find("paper-legend").replaceChildren(...["λmax", "λmid", "λmin"].map((name, index) => {
      const key = element("i", {className: "line"})
      key.style.background = COLOURS[index]
      return element("span", {}, key, name)
    }))
    const ends = new Bokeh.Range1d({start: 0, end: Math.PI / 2})
    const curves = this.plot("eigenvalue × |g| / |y|", true, 300, ends)
    this.paper = {curves}
    const {theory, points} = this.page.eigenvalues, dashes = [[], [6, 3], [2, 2]]
    theory.values.forEach((values, index) => {
      curves.figure.line(theory.angle, values, {line_width: 2, line_dash: dashes[index], line_color: COLOURS[index]})
    })
    points.forEach(({angle, values}, index) => {
      const marker = ["circle", "triangle", "square", "diamond"][index % 4]
      for (const value of values) {
        curves.figure.scatter(angle, value, {size: 5, marker, fill_color: null, line_color: COLOURS[(3 + index) % COLOURS.length]})
      }
    })
    const limit = points.flatMap(({values}) => values.flat()).filter((value) => value > 0 && Number.isFinite(value))
    const least = Math.min(1e-2, ...limit), greatest = Math.max(1e2, ...limit)
    curves.figure.y_range.setv({start: least / 1.3, end: greatest * 1.3})
    curves.figure.xaxis.axis_label = "angle ψ between y and g (rad)"
    curves.span.visible = false
    this.place(target, curves, "eigenvalues of the optimal metric against the angle")
    const spectrum = this.withTools(this.plot("eigenvalue of the optimal metric", true, 300))
    this.paper.spectrum = this.figures.spectrum = spectrum
    this.place(target, spectrum, "eigenvalues of the optimal metric over the steps")
    const loss = this.withTools(this.plot("loss", this.isWide("loss"), 300))
    this.paper.loss = this.figures.average = loss
    this.place(target, loss, "loss and its mean over the steps")
  }

  drawPaper(first, last) {
    if (!this.paper || !this.run.gradient) return
    const lines = []
    const draw = (found, key, cells, log, shade, width, collected) => {
      const values = curveOf(cells, 0, first, last, log), drawn = this.curve(found, key, width)
      drawn.source.data = values
      drawn.single.data = isolated(values)
      drawn.line.glyph.line_color = drawn.band.glyph.fill_color = drawn.dots.glyph.fill_color = shade
      collected.push(values)
    }
    ;["eigenvalue_max", "eigenvalue_mid", "eigenvalue_min"].forEach((name, index) => {
      const cells = this.model(name, this.run.descents[0], 1)
      if (cells) draw(this.paper.spectrum, name, cells, true, COLOURS[index], 1.5, lines)
    })
    this.fit(this.paper.spectrum, lines)
    const losses = [], loss = this.model("loss"), longest = this.run.windows[this.run.windows.length - 1]
    if (loss) draw(this.paper.loss, "loss", loss, false, longest > 1 ? colour("--muted") : colour("--ink"), 1, losses)
    const average = longest > 1 ? this.model("loss_average", this.run.descents[0], longest) : null
    if (average) draw(this.paper.loss, "average", average, false, COLOURS[0], 2, losses)
    this.fit(this.paper.loss, losses)
  }

  // Theme

  theme() {
    const chosen = find("theme").value
    if (chosen === "auto") delete document.documentElement.dataset.theme
    else document.documentElement.dataset.theme = chosen
    this.applyTheme()
  }

  applyTheme() {
    const ink = colour("--ink"), muted = colour("--muted"), line = colour("--line"), page = colour("--page")
    const every = [...Object.values(this.figures), ...(this.paper && this.run.gradient ? [this.paper.curves] : [])]
    for (const {figure, span} of every) {
      figure.setv({background_fill_color: page, border_fill_color: page, outline_line_color: line})
      for (const axis of [...figure.below, ...figure.left]) {
        axis.setv({
          axis_line_color: muted, major_tick_line_color: muted, minor_tick_line_color: line,
          major_label_text_color: ink, axis_label_text_color: ink, axis_label_text_font_style: "normal",
          major_label_text_font_size: "12px", axis_label_text_font_size: "12px",
        })
      }
      for (const grid of figure.center) if ("grid_line_color" in grid.attributes) grid.setv({grid_line_color: line, grid_line_alpha: 0.7})
      span.line_color = muted
    }
    this.drawCurves()
    this.legend()
  }
}

// Helpers of the page ------------------------------------------------------------------------------------------

function on(id, event, action) {
  find(id).addEventListener(event, action)
}

function fill(select, entries) {
  select.replaceChildren(...entries.map(([value, text]) => element("option", {value: String(value), textContent: text})))
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim()
}

function shortened(text, limit) {
  if (text.length <= limit) return text
  const start = Math.floor(limit / 3)
  return `${text.slice(0, start)}…${text.slice(text.length - (limit - start - 1))}`
}

/* Values without a neighbour, which a line does not show. */
function isolated({x, y}) {
  const alone = y.map((value, index) => !Number.isNaN(value) && Number.isNaN(y[index - 1] ?? NaN) && Number.isNaN(y[index + 1] ?? NaN))
  return {x: x.filter((_, index) => alone[index]), y: y.filter((_, index) => alone[index])}
}

function heatPalette(variable) {
  // Angles up to pi/2 are effective, and a small angle is gradient descent: dark is unusual.
  const colours = variable === "update_to_weight" ? Bokeh.Palettes.Viridis256 : Bokeh.Palettes.Cividis256
  return colours.map((each) => (typeof each === "string" ? each : `#${(each >>> 8).toString(16).padStart(6, "0")}`))
}

function tooltipOf(heading, rows) {
  const table = element("table")
  for (const [name, text, shade] of rows) {
    const key = element("td")
    key.style.cssText = `width:10px;border-left:4px solid ${shade ?? "transparent"}`
    const label = element("td", {textContent: shortened(name, 44)})
    const value = element("td", {textContent: text})
    value.style.cssText = "text-align:right;padding-left:12px;white-space:nowrap"
    table.append(element("tr", {}, key, label, value))
  }
  const root = element("div", {}, element("b", {textContent: heading}), table)
  root.style.cssText = "color:#222;background:#fff;font:12px/1.4 system-ui,sans-serif;max-width:360px;overflow-wrap:anywhere"
  return root
}

async function main() {
  Bokeh.set_log_level("warn")
  const page = JSON.parse(find("data").textContent)
  const overview = new Overview(page, await Arrays.unpack(find("arrays").textContent))
  await overview.start()
  window.report = overview
  document.documentElement.dataset.ready = "yes"
}

main().catch((error) => {
  const message = find("failure")
  message.hidden = false
  message.textContent = `The figures cannot be drawn: ${error.message}. The tables below do not need them.`
  console.error(error)
})
