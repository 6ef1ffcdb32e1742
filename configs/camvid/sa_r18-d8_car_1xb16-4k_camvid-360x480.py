_base_ = './sa_r18-d8_1xb16-4k_camvid-360x480.py'
model = dict(type='CAREncoderDecoder', car=dict(channels=128))
