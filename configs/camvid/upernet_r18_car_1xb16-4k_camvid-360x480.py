_base_ = './upernet_r18_1xb16-4k_camvid-360x480.py'
model = dict(type='CAREncoderDecoder', car=dict(channels=128, pool=2))
