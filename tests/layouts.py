"""Find faults in the layout of a page, in a browser: content that is cut off, covered or not drawn.

Pixels depend on fonts and versions of the browser. These checks do not: they compare boxes with each other, and a
figure with the same figure without its data.
"""

FAULTS = """() => {
  const faults = [], {clientWidth: width, scrollWidth} = document.documentElement
  if (scrollWidth > width) faults.push(`the page is ${scrollWidth} px wide`)
  const scrolls = (element) => ["auto", "scroll", "hidden"].includes(getComputedStyle(element).overflowX)
  const name = (element) => `${element.localName} ${element.closest("[id]")?.id} ${element.innerText?.slice(0, 30)}`
  /* The visible part of a box: scrolling and hidden parts of its ancestors do not count. */
  function visible(element, box) {
    if (!element.checkVisibility()) return null // within a closed element, for example
    let {left, top, right, bottom} = box
    for (let parent = element; parent && parent !== document.body; parent = parent.parentElement) {
      const style = getComputedStyle(parent)
      if (style.visibility === "hidden" || Number(style.opacity) === 0 || style.clipPath !== "none") return null
      if (parent !== element && scrolls(parent)) {
        const outer = parent.getBoundingClientRect()
        left = Math.max(left, outer.left); right = Math.min(right, outer.right)
        top = Math.max(top, outer.top); bottom = Math.min(bottom, outer.bottom)
      }
    }
    return right - left > 1 && bottom - top > 1 ? {left, top, right, bottom} : null
  }
  const boxes = []
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  for (let node = texts.nextNode(); node; node = texts.nextNode()) {
    const parent = node.parentElement
    if (!node.data.trim() || parent.closest("script, style, noscript, option, select, .tall tbody")) continue
    const range = document.createRange()
    range.selectNodeContents(node)
    for (const part of range.getClientRects()) {
      const box = visible(parent, part)
      if (box) boxes.push({element: parent, ...box})
    }
  }
  for (const element of document.querySelectorAll("input, select, button, [data-root-id], .plot > *, #heat > *")) {
    const box = visible(element, element.getBoundingClientRect())
    if (box && !element.closest(".tall tbody")) boxes.push({element, ...box})
  }
  for (const box of boxes) {
    if (box.left < -1 || box.right > width + 1) faults.push(`${name(box.element)} is cut off`)
  }
  for (const [index, one] of boxes.entries()) {
    for (const other of boxes.slice(index + 1)) {
      if (one.element.contains(other.element) || other.element.contains(one.element)) continue
      const across = Math.min(one.right, other.right) - Math.max(one.left, other.left)
      const down = Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top)
      if (across > 2 && down > 4) faults.push(`${name(one.element)} covers ${name(other.element)}`)
    }
  }
  return [...new Set(faults)]
}"""

FIGURES = """Bokeh.index.roots.filter(({el, model}) => el.isConnected && Array.isArray(model.renderers))
  .map((view) => view.model.id)"""
DATA = """([id, shown]) => {
  const view = Bokeh.index.roots.find((view) => view.model.id === id)
  for (const one of view.model.renderers) {
    if (shown && one.wasVisible !== undefined) one.visible = one.wasVisible
    if (!shown) { one.wasVisible = one.visible; one.visible = false }
  }
  view.el.scrollIntoView({block: "center"})
  return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => {
    const {x, y, width, height} = view.el.getBoundingClientRect()
    done({x, y, width, height})
  })))
}"""


def faults_of(page):
    """Return what is wrong with the layout of a page that is open in a browser, as a list of sentences."""
    page.evaluate("scrollTo(0, 0)")
    found = page.evaluate(FAULTS)
    for figure in page.evaluate(FIGURES):
        shots = [page.screenshot(clip=page.evaluate(DATA, [figure, shown])) for shown in (False, True)]
        if shots[0] == shots[1]:
            found.append(f"figure {figure} shows no data")
    return found
