"""A saved SVG as an element of an HTML page, where several share one document.

Inside a page the ids of all pictures share one namespace and a picture's style sheet reaches the whole page, so both
are tied to the picture. Metadata, indentation and ids that nothing refers to are left out: they are a good part of
what matplotlib writes.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

_SVG = "{http://www.w3.org/2000/svg}"
_XLINK = "{http://www.w3.org/1999/xlink}"
_DROPPED = {"metadata", "script"}
_REFERENCE = re.compile(r"url\(\s*[\"']?#([^\"')]+)[\"']?\s*\)")
_CSS_PIXELS_PER_POINT = 4 / 3


def inline(svg: bytes, prefix: str, attributes: dict[str, str]) -> tuple[str, float, float]:
    """An SVG document as markup for HTML, with its width and height in CSS pixels.

    Args:
      svg: the document, as matplotlib saves it: sizes in points, a viewBox.
      prefix: the element's id, and what every id inside begins with.
      attributes: further attributes of the element.
    """
    root = ElementTree.fromstring(svg)
    width, height = (_pixels(root.attrib.pop(side)) for side in ("width", "height"))
    _clean(root)
    _own(root, prefix)
    for name in ("version", "id"):
        root.attrib.pop(name, None)
    root.attrib = {"id": prefix, **root.attrib, **attributes}
    return ElementTree.tostring(root, encoding="unicode"), width, height


def _pixels(length: str) -> float:
    number = float(length.removesuffix("pt").removesuffix("px"))
    return number * _CSS_PIXELS_PER_POINT if length.endswith("pt") else number


def _clean(element: ElementTree.Element) -> None:
    """Takes away namespaces, which HTML's parser knows, and whatever is not drawn."""
    element.tag = element.tag.removeprefix(_SVG)
    names = {name: name.removeprefix(_XLINK) for name in element.attrib}
    element.attrib = {plain: element.attrib[name] for name, plain in names.items() if "}" not in plain}
    for child in list(element):
        if child.tag.removeprefix(_SVG) in _DROPPED or not child.tag.startswith(_SVG):
            element.remove(child)
            continue
        _clean(child)
        if not (child.tail or "").strip() and element.tag not in ("text", "tspan"):
            child.tail = None
    if not (element.text or "").strip() and element.tag not in ("text", "tspan"):
        element.text = None


def _own(root: ElementTree.Element, prefix: str) -> None:
    """Ties ids, references to them and style rules to this picture."""
    used = set()
    for element in root.iter():
        for name, value in element.attrib.items():
            used.update(_REFERENCE.findall(value))
            if name == "href" and value.startswith("#"):
                used.add(value[1:])
    for element in root.iter():
        attributes = {}
        for name, value in element.attrib.items():
            if name == "id":
                if value not in used:
                    continue
                value = f"{prefix}-{value}"
            elif name == "href":
                # Base64 is saved in lines.
                value = f"#{prefix}-{value[1:]}" if value.startswith("#") else "".join(value.split())
            attributes[name] = _REFERENCE.sub(lambda found: f"url(#{prefix}-{found[1]})", value)
        element.attrib = attributes
        if element.tag == "style":
            element.attrib = {}
            element.text = re.sub(r"([^{}]+)\{", lambda rule: _scoped(rule[1], prefix) + "{", element.text or "")


def _scoped(selectors: str, prefix: str) -> str:
    return ", ".join(f"#{prefix} {selector.strip()}" for selector in selectors.split(","))
