"""The only place that knows model families: loading, common names of sites, the head, the attention function."""

from deltaprompt.backbone.load import Backbone, Kind, load, wrap
from deltaprompt.backbone.sites import Part, Site, Sites

__all__ = ["Backbone", "Kind", "Part", "Site", "Sites", "load", "wrap"]
