_base_ = './unet_1xb4-1k_fusion-shapes-128x128.py'
# By name: MMSegmentation's UNet has its decoder in the backbone, which 'auto' leaves alone.
custom_hooks = [
    dict(type='ScaleEqualizerHook', layers=['backbone.decoder'])
]
