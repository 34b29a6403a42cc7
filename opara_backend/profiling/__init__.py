"""What each kernel demands of a GPU and how long it takes there: a KernelGraph goes in, a profile comes out.

`device` describes a GPU as plain numbers, `occupancy` turns one kernel launch and such a description into blocks per
SM, waves and a share of the GPU. Both import without torch; only reading the GPU at hand needs it.
"""
