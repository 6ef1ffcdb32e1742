_base_ = './upernet_r18_1xb16-4k_camvid-360x480.py'
custom_hooks = [dict(type='ScaleEqualizerHook')]
