_base_ = [
    '../_base_/models/ksac_xception65-d16.py',  # KSAC with Xception-65 and decoder, output stride 16
    '../_base_/datasets/coco-voc12aug_513x513.py',  # COCO in VOC's 21 classes, VOC 2012 and SBD
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_300k_wd1e-4.py'  # SGD, lr 0.01, wd 1e-4, polynomial decay to 0
]
crop_size = (513, 513)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    # Two rates more and not one weight more, batch norms apart.
    decode_head=dict(dilations=(1, 6, 12, 18, 24)))
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=4e-5))
