"""Deltas on a backbone: where they go, their slots, the hooks that call them, merging."""

from deltaprompt.compose.adapted import Adapted as Adapted
from deltaprompt.compose.adapted import carries_deltas as carries_deltas
from deltaprompt.compose.adapted import patches_on as patches_on
from deltaprompt.compose.adapted import plain as plain
from deltaprompt.compose.placing import instances as instances
from deltaprompt.compose.placing import parameters_of as parameters_of
from deltaprompt.compose.placing import sites_of as sites_of
from deltaprompt.compose.routing import Index as Index
from deltaprompt.compose.routing import Routing as Routing
from deltaprompt.compose.stack import Stack as Stack
