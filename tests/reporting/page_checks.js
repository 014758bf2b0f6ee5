// What tests of a page ask of all its texts, in the browser.
({
  // Pairs of texts whose boxes overlap. A line of text is higher than its letters, so that 2 pixels are no overlap.
  overlaps: () => {
    const boxes = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
      const parent = node.parentElement;
      if (!node.data.trim() || parent.closest("script, style, noscript, option, select, .skip") || !parent.checkVisibility()) continue;
      const range = document.createRange();
      range.selectNodeContents(node);
      const rects = parent.closest("svg") ? [parent.getBoundingClientRect()] : range.getClientRects();
      const clip = parent.closest("code, .scroll")?.getBoundingClientRect() || { left: -1e9, right: 1e9 };
      for (const r of rects) {
        const [left, right] = [Math.max(r.left, clip.left), Math.min(r.right, clip.right)];
        if (left < right) boxes.push([left, r.top + 2, right, r.bottom - 2, node.data.trim()]);
      }
    }
    boxes.sort((a, b) => a[1] - b[1]);
    const found = [];
    boxes.forEach((a, i) => {
      for (let j = i + 1; j < boxes.length && boxes[j][1] < a[3]; j++) {
        const b = boxes[j];
        if (Math.min(a[2], b[2]) - Math.max(a[0], b[0]) > 1 && Math.min(a[3], b[3]) - Math.max(a[1], b[1]) > 0) found.push([a[4], b[4]]);
      }
    });
    return { n: boxes.length, found, wide: document.documentElement.scrollWidth - innerWidth };
  },

  // Texts with a contrast below 4.5 (WCAG 2.2, 1.4.3): the colour of the text against what lies under it.
  contrasts: () => {
    const parse = (text) => text.match(/[\d.]+/g).map(Number);
    const part = (x) => (x / 255 <= 0.03928 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4);
    const light = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
    const under = (node) => {
      for (let at = node; at; at = at.parentElement) {
        const color = parse(getComputedStyle(at).backgroundColor);
        if (color.length < 4 || color[3] > 0) return color;
      }
      return [255, 255, 255];
    };
    const low = [];
    let n = 0;
    for (const node of document.querySelectorAll("body *")) {
      const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
      if (!own || node.closest("script, style, noscript, option, .skip") || !node.checkVisibility()) continue;
      const isSvg = node.ownerSVGElement;
      let back = under(node);
      if (isSvg) {
        const box = node.getBBox(), x = box.x + box.width / 2, y = box.y + box.height / 2;
        for (const rect of node.getAttribute("transform") ? [] : isSvg.querySelectorAll("rect")) {
          const b = rect.getBBox(), fill = getComputedStyle(rect).fill;
          if (fill !== "none" && x > b.x && x < b.x + b.width && y > b.y && y < b.y + b.height) back = parse(fill);
        }
      }
      const [a, b] = [light(parse(isSvg ? getComputedStyle(node).fill : getComputedStyle(node).color)), light(back)].sort((p, q) => q - p);
      n += 1;
      if ((a + 0.05) / (b + 0.05) < 4.5) low.push([node.textContent.slice(0, 40), ((a + 0.05) / (b + 0.05)).toFixed(2)]);
    }
    return { n, low };
  },
})
