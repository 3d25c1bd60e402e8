"""How well a bundle's model does on a text or on questions: computed on the device, with NumPy alone."""
