"""Images, from files to batches on the training device; ``dataloader`` makes its batches.

Reading order:

- finding the images: ``data_sets`` (any data set), ``folders``, ``archives`` (CIFAR), ``synthetic`` (the
  demo), ``subsets`` (what they return), ``split`` (which images are held out);
- an image: ``reading`` (from a file), ``transforms`` (crops, flips and augmentation), ``preprocessing``
  (a photograph for ``AdaptivePredictor``);
- many images: ``batches``, ``threads``;
- ``defaults``: what depends on the data set's name, its image size or the machine.
"""
