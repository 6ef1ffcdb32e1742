_base_ = './hfgd-sfpn_lite0_1xb4-1k_camvid-180x240.py'
# Every stop-gradient removed (HFGD, section 5.2).
model = dict(decode_head=dict(stop_gradient=False))
