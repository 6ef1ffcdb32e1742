_base_ = [
    '../_base_/models/gff_wrn38-d8.py',  # the released GFF and DFP on DeepLabV3+
    '../_base_/datasets/cityscapes-trainval_864x864_gff.py',  # train and val, tested on the test images
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_100k_lr1e-3_wd1e-4.py'  # SGD, lr 1e-3 falling to 0
]
# Fine-tuned on both: from the model of the train images.
load_from = 'work_dirs/gff-dfp_wrn38-d8_4xb2-100k_cityscapes-864x864/iter_100000.pth'
crop_size = (864, 864)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(576, 576)))
