"""Measurements of networks, for figures: a network goes in, a small record of numbers comes out.

| module      | measures | figure |
|-------------|----------|--------|
| trajectory  | x_t of a float network's own sampling, which all others are shown | - |
| activations | how a float network's activations depend on t | 2 |
| quantizers  | errors, ranges and output noise of a network's quantizers | 3, 9, layers |
| alone       | the error of x_0 that each activation quantizer makes alone | layers |
| samples     | images of several networks from the same noise | 5 to 7 |
"""
