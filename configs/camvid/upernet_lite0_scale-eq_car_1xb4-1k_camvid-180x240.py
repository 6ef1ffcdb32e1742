_base_ = './upernet_lite0_1xb4-1k_camvid-180x240.py'
model = dict(type='CAREncoderDecoder', car=dict(channels=64, pool=2))
custom_hooks = [dict(type='ScaleEqualizerHook')]
