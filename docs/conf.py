from importlib.metadata import version as installed_version

project = "seqdgm"
author = "The seqdgm authors"
copyright = "The seqdgm authors"
release = installed_version("seqdgm")
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "numpydoc",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
# Shapes are part of a signature here; without this, long module paths would drown them.
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
numpydoc_show_class_members = False
autosummary_generate = False

html_theme = "furo"
html_title = f"seqdgm {release}"
