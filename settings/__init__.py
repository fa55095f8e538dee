"""The settings of a run, made by ``command_line`` from flags, presets and recipes.

``conflicts`` has the rules about flags that do not go together. The flags and their defaults are in ``args``,
the presets in ``presets``.
"""
