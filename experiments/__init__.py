"""The programs that trained and measured what ``results/`` shows.

Reading order:

- the comparison: ``arms`` (trains and evaluates), ``tables`` (tables and plot of its results), ``markdown``;
- other runs: ``backbones`` (a pretrained network), ``small_data`` (few images);
- promises: ``risk`` (accuracy), ``deadlines`` (time), ``drift`` (the alarm), on ``corruptions``;
- the shipped networks: ``ship``, and ``paired`` (two of them on the same images);
- ``network_data``: a network's own images, for the measurements above.
"""
