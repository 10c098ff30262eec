"""The plan: which rank and which format every linear of a decoder gets, chosen together by what they cost the model.

`options` lists what a linear may become, `costs` predicts what each option does to the model's loss, `allocate`
chooses one for each linear within a budget of bytes, `file` keeps the choice as JSON that can be read and edited,
`table` prints it. Paper: Gholami et al., CASP, CVPR 2025, arXiv 2503.05936, section 3.3 (optimal bit allocation), here
over ranks too.
"""
