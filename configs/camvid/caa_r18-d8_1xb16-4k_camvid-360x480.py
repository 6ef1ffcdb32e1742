_base_ = './aa_r18-d8_1xb16-4k_camvid-360x480.py'
model = dict(decode_head=dict(attention='channelized_axial'))
